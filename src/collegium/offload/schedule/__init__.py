"""Schedulers: in which order, and on which processor, the experts of a layer are loaded and computed."""
