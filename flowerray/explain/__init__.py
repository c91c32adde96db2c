"""Why two images are alike for a model: heat maps, concepts, and whether these can be believed."""
