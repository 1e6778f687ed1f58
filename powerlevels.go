package mxfed

// powerLevels is the content of an m.room.power_levels event, read once.
type powerLevels struct{}

func parsePowerLevels(rules *roomRules, content value) (*powerLevels, error) {
	return &powerLevels{}, nil
}
