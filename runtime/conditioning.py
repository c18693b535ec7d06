"""What the UNet is told beside the latent: the texts, and in XL the pooled text and the sizes.

Rows of every array are groups of conditionings, [uncond, cond], each for every picture.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from engine.adapters.textual_inversion import Embedding
from engine.backends import Engine
from engine.errors import ModelError, RequestError
from engine.model import Model
from engine.signature import Part, TextPart
from runtime.tokenizer import Tokenizer

__all__ = ["Conditioning", "Encoder", "Texts", "check_tokenizers", "load_tokenizers"]

Array = NDArray[np.float32]

# What the refiner is told: pictures that people liked, and for the negative prompt others.
# (Podell et al. 2023, arXiv:2307.01952; the numbers are those of the published pipeline.)
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
PAD_TOKENS = {"quick_gelu": "<|endoftext|>", "gelu": "!"}  # CLIP's own encoders, and OpenCLIP's


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Texts:
    """The texts of one call, and how much of each counts.

    groups: for each conditioning one text for every prompt; the last is the prompts themselves
    weights: of the groups, [1 - s, s] for classifier-free guidance
    repeats: pictures of each prompt
    """

    groups: Sequence[Sequence[str]]
    weights: Sequence[float]
    repeats: int

    @property
    def pictures(self) -> int:
        """B."""
        return len(self.groups[0]) * self.repeats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conditioning:
    """Inputs of the step that stay the same from the first step to the last.

    inputs: context (g, B, n, D), guidance (g, B); where the model takes them text_embeds
        (g, B, P), time_ids (g, B, T), timestep_cond (B, E)
    warnings: that a prompt was cut, a sentence each
    """

    inputs: Mapping[str, Array]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoder:
    """The text encoders of a model with their tokenizers.

    extra: (e, D) for each, the rows of the words that textual inversion taught them
    """

    model: Model
    tokenizers: Mapping[TextPart, Tokenizer]
    engine: Callable[[Part], Engine]
    extra: Mapping[TextPart, Array] = field(default_factory=dict)

    def taught(self, embeddings: Sequence[Embedding]) -> "Encoder":
        """Return encoders that know these words and no others; raises ModelError, RequestError."""
        encoders = self.model.text_encoders
        for embedding in embeddings:
            embedding.check({str(name): config.hidden_size for name, config in encoders.items()})
        tokenizers, extra = load_tokenizers(self.model), {}
        for name, config in encoders.items() if embeddings else ():
            first, words = config.vocab_size, {}
            for embedding in embeddings:
                if embedding.name in words:
                    raise RequestError(
                        f"Two textual inversions mean the word {embedding.name!r}; "
                        "rename the file of one."
                    )
                count = len(embedding.vectors[name])
                words[embedding.name] = range(first, first + count)
                first += count
            tokenizers[name] = tokenizers[name].with_words(words)
            extra[name] = np.concatenate([embedding.vectors[name] for embedding in embeddings])
        return replace(self, tokenizers=tokenizers, extra=extra)

    def condition(
        self, texts: Texts, height: int, width: int, guidance_scale: float
    ) -> Conditioning:
        """Encode the texts, and add what else the model is told; height and width in pixels."""
        context, pooled, warnings = self._encode(texts)
        weights = np.array(texts.weights, np.float32)
        inputs = {"context": context, "guidance": np.repeat(weights[:, None], texts.pictures, 1)}
        unet = self.model.unet
        if self.model.is_xl:
            inputs["text_embeds"] = pooled
            inputs["time_ids"] = self._time_ids(texts, height, width)
        if unet.time_cond_proj_dim:
            row = embedded_guidance(guidance_scale, unet.time_cond_proj_dim)
            inputs["timestep_cond"] = np.repeat(row[None], texts.pictures, 0)
        return Conditioning(inputs=inputs, warnings=warnings)

    def _encode(self, texts: Texts) -> tuple[Array, Array, tuple[str, ...]]:
        """Encode each distinct text once; also return the last encoder's pooled text."""
        distinct = list(dict.fromkeys(text for group in texts.groups for text in group))
        rows = np.array(
            [
                [distinct.index(text) for text in group for _ in range(texts.repeats)]
                for group in texts.groups
            ]
        )
        widths, cuts = [], []
        for name, tokenizer in self.tokenizers.items():
            tokens = tokenizer(distinct)
            none = np.zeros((1, self.model.text_encoders[name].hidden_size), np.float32)
            encoded = self.engine(name).run(
                {"input_ids": tokens.input_ids, "extra_embeddings": self.extra.get(name, none)}
            )
            widths.append(encoded[self.model.context][rows])
            pooled: Array = encoded["pooled"][rows]
            cuts.append(tokens.cuts)
        context: Array = np.concatenate(widths, axis=-1)
        if self.model.zeros_for_empty_prompt:
            for group, negative in enumerate(texts.groups[:-1]):
                empty = [not text for text in negative for _ in range(texts.repeats)]
                context[group, empty], pooled[group, empty] = 0, 0
        room = min(tokenizer.max_length for tokenizer in self.tokenizers.values()) - 2
        warnings = tuple(
            f"the prompt is longer than {room} tokens; it was cut before {_shorten(cut)!r}"
            for cut in cuts[0]
            if cut is not None
        )
        return context, pooled, warnings

    def _time_ids(self, texts: Texts, height: int, width: int) -> Array:
        """Return (g, B, T): the size before cropping, the corner cropped at, then the size wanted.

        The refiner is told a score in place of the last (arXiv:2307.01952, section 2.2).
        """
        told = [height, width, 0, 0]
        groups = len(texts.groups)
        if self.model.unet.addition_time_ids == len(told) + 1:
            scores = [NEGATIVE_AESTHETIC_SCORE] * (groups - 1) + [AESTHETIC_SCORE]
            rows = [[*told, score] for score in scores]
        else:
            rows = [[*told, height, width]] * groups
        return np.repeat(np.array(rows, np.float32)[:, None], texts.pictures, 1)


def embedded_guidance(guidance_scale: float, channels: int) -> Array:
    """Embed a guidance scale as sines and cosines, (channels,), as LCM was trained with it.

    Luo et al. 2023, arXiv:2310.04378, section 4.3, after Kingma et al. 2021 (VDM).
    """
    half = channels // 2
    frequencies = np.exp(-math.log(10000.0) / (half - 1) * np.arange(half))
    angles = (guidance_scale - 1) * 1000.0 * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(channels % 2)])
    return waves.astype(np.float32)


def load_tokenizers(model: Model) -> dict[TextPart, Tokenizer]:
    """Load the tokenizer of each text encoder: the folder's own, or CLIP's; raises ModelError."""
    tokenizers: dict[TextPart, Tokenizer] = {}
    for name, config in model.text_encoders.items():
        if model.path.is_dir():
            folder = name.replace("text_encoder", "tokenizer")
            tokenizers[name] = Tokenizer.load(model.path / folder)
        else:
            tokenizers[name] = Tokenizer.clip(PAD_TOKENS[config.hidden_act])
    check_tokenizers(model, tokenizers)
    return tokenizers


def check_tokenizers(model: Model, tokenizers: Mapping[TextPart, Tokenizer]) -> None:
    """Raise ModelError unless every text encoder knows its tokenizer's tokens."""
    for name, tokenizer in tokenizers.items():
        encoder = model.text_encoders[name]
        if tokenizer.max_length > encoder.max_position_embeddings:
            raise ModelError(
                f"the tokenizer of {model.path} makes rows of {tokenizer.max_length} tokens and "
                f"its {name} takes {encoder.max_position_embeddings}; use parts of one model"
            )
        if tokenizer.vocab_size > encoder.vocab_size:
            raise ModelError(
                f"the tokenizer of {model.path} knows {tokenizer.vocab_size} tokens and its "
                f"{name} {encoder.vocab_size}; use parts of one model"
            )


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"
