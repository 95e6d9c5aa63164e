"""Draws the mouth region of a speaker, all frames of an utterance at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodule.demo_visemes import Shape, smooth_noise

FRAME_SIZE = 96  # pixels
# How much of teeth and tongue the clearest and the darkest speaker show, how far the head moves.
TEETH_RANGE = (0.4, 1.0)
TONGUE_RANGE = (0.4, 1.0)
HEAD_MOTION_PX = 1.2
HEAD_MOTION_RATE_HZ = 0.8
TILT_MOTION = 0.015
SENSOR_NOISE = 2.5  # grey levels
NOISE_FRAMES = 8  # sensor noise is drawn from a speaker's stock of so many frames

# Red, green, blue of the lightest and the darkest skin and lips; a speaker's lie between.
SKIN_COLOURS = np.array([[236, 196, 172], [112, 74, 56]], np.float32)
LIP_COLOURS = np.array([[206, 104, 104], [112, 48, 50]], np.float32)
CAVITY_COLOUR = np.array([46, 16, 18], np.float32)
TEETH_COLOUR = np.array([226, 218, 202], np.float32)
TONGUE_COLOUR = np.array([176, 84, 86], np.float32)


@dataclass(frozen=True)
class Face:
    """What all pictures of a speaker share; lengths in pixels or in half mouth widths."""

    half_width: float  # half the width of the mouth at rest, in pixels
    centre: tuple[float, float]  # x and y of the mouth's centre, in pixels
    tilt: float  # slope of the lip line
    upper_lip: float  # height of the upper lip, in half widths
    lower_lip: float  # height of the lower lip, in half widths
    bow: float  # depth of the cupid's bow, 0 to 1
    smile: float  # how far the corners lie above the middle, in half widths
    skin: np.ndarray  # red, green and blue, 0 to 255
    lips: np.ndarray  # red, green and blue, 0 to 255
    light: float  # brightness from left to right, slope per frame width
    stubble: float  # darkening around the mouth, 0 to 1
    teeth: float  # how far the upper teeth show, 0 to 1
    tongue: float  # how far the tongue shows, 0 to 1
    clarity: float  # how fully the speaker articulates, 0 to 1
    lip_texture: np.ndarray  # brightness of the lips over the width, (64,)
    sensor_noise: np.ndarray  # grey levels, (NOISE_FRAMES, H, W)


def draw_face(random: np.random.Generator) -> Face:
    """Draw the face of a speaker."""
    darkness = random.uniform() ** 1.3
    redness = random.uniform(0.55, 1.0)
    skin = SKIN_COLOURS[0] + darkness * (SKIN_COLOURS[1] - SKIN_COLOURS[0])
    lips = LIP_COLOURS[0] + darkness * (LIP_COLOURS[1] - LIP_COLOURS[0])
    return Face(
        half_width=random.uniform(21.0, 26.0),
        centre=(48 + random.uniform(-3, 3), 48 + random.uniform(-3, 3)),
        tilt=random.uniform(-0.05, 0.05),
        upper_lip=random.uniform(0.22, 0.34),
        lower_lip=random.uniform(0.32, 0.46),
        bow=random.uniform(0.4, 1.0),
        smile=random.uniform(-0.04, 0.07),
        skin=skin * random.uniform(0.92, 1.05),
        lips=lips * redness + 0.88 * skin * (1 - redness),
        light=random.uniform(-0.25, 0.25),
        stubble=max(0.0, random.uniform(-0.2, 0.2)),
        teeth=random.uniform(*TEETH_RANGE),
        tongue=random.uniform(*TONGUE_RANGE),
        clarity=random.uniform(),
        lip_texture=random.normal(1.0, 0.04, 64).astype(np.float32),
        sensor_noise=SENSOR_NOISE
        * random.standard_normal((NOISE_FRAMES, FRAME_SIZE, FRAME_SIZE), np.float32),
    )


@dataclass(frozen=True)
class _Curves:
    """Outlines of the mouth: y in pixels for every frame and column, each (T, 1, W)."""

    across: np.ndarray  # x in half mouth widths, 0 in the middle and beyond 1 outside the mouth
    line: np.ndarray  # where closed lips meet
    upper_outer: np.ndarray
    upper_inner: np.ndarray
    lower_inner: np.ndarray
    lower_outer: np.ndarray


def render(face: Face, track: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draw all frames of an utterance; head motion and sensor noise are random.

    Args:
        face: The speaker.
        track: Shape of the mouth, float32 (T, F), the fields of `Shape` in order.
        random: Source of what is random.

    Returns:
        uint8 (T, H, W, 3), red, green, blue.
    """
    shape = Shape(*track.T[:, :, None, None])  # each field (T, 1, 1)
    num_frames = len(track)

    def motion(spread: float) -> np.ndarray:
        course = smooth_noise(num_frames, HEAD_MOTION_RATE_HZ, random)
        return (spread * course).astype(np.float32)[:, None, None]  # (T, 1, 1)

    columns = np.arange(FRAME_SIZE, dtype=np.float32)
    x = columns[None, None, :] - face.centre[0] - motion(HEAD_MOTION_PX)  # (T, 1, W)
    middle = face.centre[1] + motion(HEAD_MOTION_PX)
    curves = _outline(face, shape, x, middle + (face.tilt + motion(TILT_MOTION)) * x)

    skin = _skin_brightness(face, curves, x, middle)  # (T, H, W)
    frames = skin[..., None] * face.skin  # (T, H, W, 3)
    top = max(0, int(curves.upper_outer.min()) - 2)
    bottom = min(FRAME_SIZE, int(curves.lower_outer.max()) + 3)
    y = columns[None, top:bottom, None]
    box = frames[:, top:bottom]
    _paint_lips(box, face, curves, y)
    _paint_opening(box, face, shape, curves, y)

    stock = random.integers(0, NOISE_FRAMES, num_frames)
    frames += face.sensor_noise[stock][..., None]
    return np.clip(frames, 0, 255, out=frames).astype(np.uint8)


def _outline(face: Face, shape: Shape, x: np.ndarray, line: np.ndarray) -> _Curves:
    """Lay the outlines of the lips: x and line (T, 1, W), y of the straight lip line."""
    size = face.half_width
    half_width = size * (1 + 0.14 * shape.width - 0.24 * shape.rounding)
    across = x / half_width
    bulge = np.clip(1 - across**2, 0, 1)
    line = line + size * (
        -face.smile * (1 - bulge) - 0.03 * np.exp(-((across / 0.6) ** 2)) + 0.03 * bulge
    )

    tuck = np.clip(shape.tuck, 0, 1)
    gap = size * 0.95 * np.clip(shape.opening, 0, 1.1) * (1 - 0.6 * tuck)
    press = np.clip(shape.press + np.maximum(-2 * shape.opening, 0), 0, 1)
    inner = np.clip(1 - (across / 0.86) ** 2, 0, 1) ** 0.65
    upper_inner = line - 0.3 * gap * inner
    lower_inner = line + (0.7 * gap - 0.05 * size * tuck) * inner

    peaks = np.exp(-(((np.abs(across) - 0.24) / 0.2) ** 2))
    dip = np.exp(-((across / 0.13) ** 2))
    upper_height = size * face.upper_lip * (1 - 0.55 * press + 0.2 * shape.rounding)
    lower_height = size * face.lower_lip * (1 - 0.45 * press - 0.35 * tuck + 0.2 * shape.rounding)
    upper = upper_height * (1 + face.bow * (0.16 * peaks - 0.2 * dip)) * bulge**0.75
    return _Curves(
        across=across,
        line=line,
        upper_outer=line - 0.22 * gap * bulge - upper,
        upper_inner=upper_inner,
        lower_inner=lower_inner,
        lower_outer=line + 0.6 * gap * bulge + lower_height * bulge**0.6,
    )


def _skin_brightness(face: Face, curves: _Curves, x: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """Shade the skin with a sum of separable spots, which move with head and jaw: (T, H, W)."""
    size = face.half_width
    x = x[:, 0] / size  # (T, W)
    y = (np.arange(FRAME_SIZE, dtype=np.float32) - middle[:, 0]) / size  # (T, H)
    centre = FRAME_SIZE // 2
    chin = (curves.lower_outer[:, :, centre] - middle[:, 0]) / size  # (T, 1)
    half_width = (x[:, -1:] - x[:, :1]) / (curves.across[:, 0, -1:] - curves.across[:, 0, :1])

    def spot(values: np.ndarray, place: float | np.ndarray, spread: float) -> np.ndarray:
        return np.exp(-(((values - place) / spread) ** 2))

    corners = spot(x, -1.08 * half_width, 0.14) + spot(x, 1.08 * half_width, 0.14)
    nostrils = spot(x, -0.3, 0.17) + spot(x, 0.3, 0.17)
    folds = spot(x, -1.5, 0.16) + spot(x, 1.5, 0.16)
    ridges = spot(x, -0.2, 0.09) + spot(x, 0.2, 0.09)
    spots = [  # brightness, over x, over y
        (1.0 + face.light * x * size / FRAME_SIZE, np.ones_like(y)),
        (-0.16 * spot(x, 0, 0.62), spot(y, chin + 0.16, 0.14)),  # hollow under the lower lip
        (0.07 * spot(x, 0, 0.55), spot(y, chin + 0.55, 0.25)),  # chin
        (-0.30 * spot(x, 0, 2.2), spot(y, chin + 1.75, 0.5)),  # under the jaw
        (-0.13 * corners, spot(y, 0.03, 0.17)),
        (-0.42 * nostrils, spot(y, -1.42, 0.13)),
        (-0.14 * spot(x, 0, 0.7), spot(y, -1.3, 0.22)),  # under the nose
        (-0.07 * spot(x, 0, 0.1), spot(y, -0.75, 0.3)),  # philtrum
        (0.045 * ridges, spot(y, -0.75, 0.3)),
        (-0.07 * folds, spot(y, -0.3, 0.6)),
        (-face.stubble * spot(x, 0, 1.3), spot(y, 0.1, 1.3)),
    ]
    over_x = np.stack([np.broadcast_to(part, x.shape) for part, _ in spots], 1).astype(np.float32)
    over_y = np.stack([np.broadcast_to(part, y.shape) for _, part in spots], 2).astype(np.float32)
    return over_y @ over_x  # (T, H, K) (T, K, W) -> (T, H, W)


def _paint_lips(box: np.ndarray, face: Face, curves: _Curves, y: np.ndarray) -> None:
    """Paint both lips over the skin: box (T, h, W, 3) in place, y (1, h, 1)."""
    inside = np.clip((1 - np.abs(curves.across)) * 6, 0, 1)
    cover = inside * _below(y, curves.upper_outer, 0.5) * _above(y, curves.lower_outer, 0.5)
    upper = np.clip(_part(y, curves.upper_outer, curves.line), 0, 1)
    lower = np.clip(_part(y, curves.lower_inner, curves.lower_outer), 0, 1)
    shade = 0.97 - 0.24 * upper + lower * (1 - lower) * 1.0
    shade -= 0.2 * np.maximum(lower - 0.75, 0)
    # Closed lips meet in a dark line, which the opening widens.
    shade *= 1 - 0.55 * np.exp(-(((y - curves.line) / 1.3) ** 2))
    position = np.linspace(-1, 1, len(face.lip_texture))
    shade *= np.interp(curves.across, position, face.lip_texture).astype(np.float32)
    _mix(box, cover, shade, face.lips)


def _paint_opening(
    box: np.ndarray, face: Face, shape: Shape, curves: _Curves, y: np.ndarray
) -> None:
    """Paint what is seen between the lips, from back to front: box (T, h, W, 3) in place."""
    size = face.half_width
    across = curves.across
    inside = np.clip((0.88 - np.abs(across)) * 8, 0, 1)
    opening = inside * _below(y, curves.upper_inner, 1.0) * _above(y, curves.lower_inner, 1.0)
    _mix(box, opening, np.float32(1.0), CAVITY_COLOUR)

    gap = curves.lower_inner - curves.upper_inner
    tongue = np.clip(shape.tongue, 0, 1)
    tongue_top = curves.lower_inner - gap * (0.4 + 0.5 * tongue) * face.tongue * np.clip(
        1.1 - (across / 0.62) ** 2, 0, 1
    )
    depth = np.clip(_part(y, tongue_top, curves.lower_inner), 0, 1)
    in_front = 0.5 + 0.5 * tongue
    _mix(box, opening * _below(y, tongue_top, 0.5) * in_front, 0.6 + 0.4 * depth, TONGUE_COLOUR)

    shown = np.clip(0.25 + 0.75 * shape.teeth, 0, 1) * face.teeth
    edge = curves.line + size * (0.24 * shown - 0.07 - 0.09 * across**2)
    gaps = 1 - 0.16 * np.exp(-((((across * size / 4.6 + 0.5) % 1.0 - 0.5) / 0.12) ** 2))
    shade = (1 - 0.75 * np.clip(np.abs(across), 0, 1) ** 2) * gaps
    fade = np.clip(0.35 + 0.25 * (y - curves.upper_inner), 0, 1)  # the upper lip's shadow
    _mix(box, opening * _above(y, edge, 0.7) * np.clip(2 * shown, 0, 1), shade * fade, TEETH_COLOUR)


def _below(y: np.ndarray, curve: np.ndarray, sharpness: float) -> np.ndarray:
    """Cover what lies below a curve, 0 to 1, with a soft edge: (T, h, W)."""
    return np.clip((y - curve) * sharpness + 0.5, 0, 1)


def _above(y: np.ndarray, curve: np.ndarray, sharpness: float) -> np.ndarray:
    """Cover what lies above a curve, 0 to 1, with a soft edge: (T, h, W)."""
    return np.clip((curve - y) * sharpness + 0.5, 0, 1)


def _part(y: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Tell how far y is on the way from one curve to another, 0 to 1 between them: (T, h, W)."""
    return (y - start) / np.maximum(end - start, 1.0)


def _mix(box: np.ndarray, cover: np.ndarray, shade: np.ndarray, colour: np.ndarray) -> None:
    """Lay a shaded colour over the box (T, h, W, 3), in place; cover and shade are (T, h, W)."""
    box += cover[..., None] * (np.asarray(shade)[..., None] * colour - box)
