"""Front-ends: from video or audio to features at a frame rate."""
