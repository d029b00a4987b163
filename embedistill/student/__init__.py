"""A student made from its teacher's own weights: the parts that make it, and the plan of what it costs."""
