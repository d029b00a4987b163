"""From texts to a teacher's vectors: by its own weights, by an endpoint, on one machine or many, each text once."""
