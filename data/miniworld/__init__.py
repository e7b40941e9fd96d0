"""The miniature world: four visual-thought task families at thumbnail size, released layout."""
