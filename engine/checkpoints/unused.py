"""Tensors that files hold and no graph needs: each kind with its reason.

A tensor that is neither used nor listed here is an error: it would be left out in silence.
"""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

__all__ = ["UNUSED", "left_over", "shown"]

# Where a whole model keeps its text encoders; a folder's part has no such prefix.
_TEXT = (
    r"(cond_stage_model\.(model\.|transformer\.)?|conditioner\.embedders\.\d\.(model\.|transformer\.)?)?"
    r"(text_model\.)?"
)

# pattern of the whole name: reason
UNUSED: Mapping[str, str] = MappingProxyType(
    {
        r"(first_stage_model\.)?model_ema\..+": "averages of weights, of which the better are used",
        r"betas|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?"
        r"|sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])"
        r"|denoiser\.(log_)?sigmas": "the noise schedule, which a rule gives",
        r"logvar|lvlb_weights|scale_factor|epoch|global_step": "settings of the training",
        r"(first_stage_model\.)?loss\..+": "the discriminator and the losses of the training",
        r"embedding_manager\..+": "words learnt beside the model",
        rf"{_TEXT}(embeddings\.)?position_ids": "the numbers 0, 1, 2 and so on",
        rf"{_TEXT}attn_mask": "the causal mask, which a rule gives",
        rf"{_TEXT}logit_scale": "the temperature of CLIP's comparison with pictures",
        rf"{_TEXT}(vision_model|visual_projection|visual)\..+": "CLIP's half for pictures",
        r"(cond_stage_model\.(transformer\.|model\.)?|conditioner\.embedders\.0\.(transformer\.)?)?"
        r"text_projection(\.weight)?": "the projection into CLIP's space, which is not attended to",
        r"v_pred|ztsnr": "a mark that says what the model predicts",
    }
)
_PATTERN = re.compile("|".join(f"(?:{pattern})" for pattern in UNUSED))


def left_over(names: Iterable[str], used: set[str], unused: str | None = None) -> list[str]:
    """Return the names that are neither used nor known to be unused.

    unused: one more pattern, of this model alone.
    """
    own = re.compile(unused or r"(?!)")
    return [
        name
        for name in names
        if name not in used and not _PATTERN.fullmatch(name) and not own.fullmatch(name)
    ]


def shown(name: str, length: int = 200) -> str:
    """Write a tensor's name, whatever characters a file puts into it, on one line."""
    return repr(name)[1:-1][:length]
