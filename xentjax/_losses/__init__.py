"""The losses, one file a family: check the arguments, call the engine, return."""
