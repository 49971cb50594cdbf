"""One loss on many devices: examples or classes split over a mesh."""
