"""Facts of clips and batches on which data and models agree. Nothing here imports torch."""

VIDEO_RATE = 25  # frames per second
AUDIO_RATE = 16000  # samples per second
SAMPLES_PER_FRAME = AUDIO_RATE // VIDEO_RATE
VIDEO_MEAN = 0.421  # of grey values in [0, 1]; models take them normalised
VIDEO_STD = 0.165
CLEAN_SNR = 999999.0  # dB; auto_avsr's way to say "no noise", and so is all above it
IGNORE_ID = -1  # pads targets
STREAMS = ("video", "audio")
MODALITIES = {
    "audio": ("audio",),
    "video": ("video",),
    "audiovisual": STREAMS,
}
