"""Teaching the tower to see: single temporal groups with dense labels, drawn and half of them sent through H.264.

`features` is transformers' own vision tower, run on many groups of one size at once (transformers loops over frames). Knows nothing about
questions or the language model.
"""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from millpond.eval.streams.digits import digit_indices, digit_value
from millpond.eval.streams.drawing import CELLS, COLOURS, DIGIT, LEVELS, Scene, Sight
from training.minnow.architecture import IMAGE_NUMBERS, Codes

__all__ = ["features", "patches", "round_trip", "sight_batch", "sight_loss"]

_SHARPNESS = 8.0
_GROUPS_A_SCENE = 4


def patches(frames: NDArray[np.uint8]) -> Tensor:
    """Frames uint8 [2 x groups, 64, 64, 3] -> float32 [groups, 64, 384], in the order that the merger expects."""
    pixels = (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 - IMAGE_NUMBERS["image_mean"][0]) / (
        IMAGE_NUMBERS["image_std"][0]
    )
    groups = len(frames) // 2
    pixels = pixels.view(groups, 2, 3, 4, 2, 8, 4, 2, 8).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    flat: Tensor = pixels.reshape(groups, 64, 384)
    return flat


def features(tower: Any, pixels: Tensor) -> Tensor:
    """What transformers' tower puts out for groups of 64 patches, all at once: [groups, 64, 384] -> [groups, 16, 128]."""
    groups, count, _ = pixels.shape
    hidden = F.linear(pixels, tower.patch_embed.proj.weight.flatten(1))
    block = torch.arange(CELLS)
    inner = torch.arange(4)
    row = (block // 4 * 2)[:, None] + inner // 2
    col = (block % 4 * 2)[:, None] + inner % 2
    cos, sin = tower.rotary_pos_emb(hidden, torch.stack([row.flatten(), col.flatten()], dim=-1))
    for layer in tower.blocks:
        attention = layer.attn
        qkv = attention.qkv(layer.norm1(hidden)).view(groups, count, 3, attention.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(_turn(query, cos, sin), _turn(key, cos, sin), value)
        hidden = hidden + attention.proj(seen.transpose(1, 2).reshape(groups, count, -1))
        hidden = hidden + layer.mlp(layer.norm2(hidden))
    merged: Tensor = tower.merger(hidden.reshape(groups * count, -1))
    return merged.view(groups, CELLS, -1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def round_trip(frames: NDArray[np.uint8], crf: int) -> NDArray[np.uint8]:
    """Frames through H.264 (yuv420p) and back, in memory: uint8 [n, H, W, 3] to the same shape."""
    store = io.BytesIO()
    with av.open(store, "w", format="mp4") as container:
        options = {"crf": str(crf), "bf": "0", "preset": "veryfast", "threads": "1"}
        stream = container.add_stream("libx264", rate=2, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    store.seek(0)
    with av.open(store) as container:
        container.streams.video[0].thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def sight_batch(rng: np.random.Generator, groups: int, split: str = "train") -> tuple[Tensor, Tensor]:
    """Random groups: patches float32 [groups, 64, 384] and labels int64 [groups, 16, 3] (kind, colour, digit; -1 for none)."""
    drawn: list[NDArray[np.uint8]] = []
    labels = np.full((groups, CELLS, 3), -1, dtype=np.int64)
    levels = list(LEVELS.values())
    images = digit_indices(split)
    for start in range(0, groups, _GROUPS_A_SCENE):
        scene = Scene(int(rng.integers(1 << 60)), levels[rng.integers(len(levels))], 128)
        at = int(rng.integers(0, 128 - 2 * _GROUPS_A_SCENE))
        for group in range(start, min(start + _GROUPS_A_SCENE, groups)):
            sights = []
            for cell in rng.permutation(CELLS)[: rng.integers(0, 8)]:
                kind = DIGIT if rng.random() < 0.35 else int(rng.integers(DIGIT))
                image = int(rng.choice(images)) if kind == DIGIT else -1
                colour = -1 if kind == DIGIT else int(rng.integers(len(COLOURS)))
                offset = (int(rng.integers(-2, 3)), int(rng.integers(-2, 3)))
                sights.append(Sight(kind, colour, int(cell), image, offset))
                labels[group, cell] = kind, colour, digit_value(image) if kind == DIGIT else -1
            for half in range(2):
                drawn.append(scene.draw(at + 2 * (group - start) + half, sights))
    frames = np.stack(drawn)
    if rng.random() < 0.6:
        frames = round_trip(frames, int(rng.integers(16, 30)))
    return patches(frames), torch.from_numpy(labels)


def sight_loss(seen: Tensor, labels: Tensor, codes: Codes) -> tuple[Tensor, dict[str, float]]:
    """How far the tower's output is from the sums of codes; and the share of right labels, over the cells that have one.

    Args:
        seen: [groups, 16, 128] of the tower.
        labels: int64 [groups, 16, 3].
    """
    loss = (seen - codes.embed(labels)).square().sum(-1).mean()
    scores = {}
    tables = {"kind": codes.kind, "colour": codes.colour, "digit": codes.digit, "cell": codes.cell}
    truths = [*labels.unbind(-1), torch.arange(CELLS).expand(labels.shape[:-1])]
    for (name, table), truth in zip(tables.items(), truths, strict=True):
        logits = _SHARPNESS * seen @ table.T
        logits = torch.cat([logits, torch.full_like(logits[..., :1], _SHARPNESS / 2)], dim=-1)
        truth = torch.where(truth < 0, len(table), truth)
        weight = torch.where(truth < len(table), 4.0, 1.0)
        each = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none")
        loss = loss + 0.5 * (each * weight.flatten()).mean()
        with torch.no_grad():
            right = logits.argmax(-1) == truth
            there = truth < len(table)
            scores[name] = right[there].float().mean().item()
            if name == "kind":
                scores["empty"] = right[~there].float().mean().item()
    return loss, scores
