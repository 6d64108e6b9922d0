"""Every peer once: the ops, the training steps and the whole programs that fastdl is timed against."""
