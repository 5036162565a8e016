"""Which parameters a stage trains (table 2): all of them, or for alignment the connector and the head's image rows.

The head is one matrix, and rows of a parameter cannot be frozen: an optimiser decays even those without a gradient,
and gradient clipping counts them. So alignment cuts the head in two parameters that its forward joins again. What is
saved is always the one matrix.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel


TRAINABLE = ("all", "alignment")

_PARTS = "lm_head.parametrizations.weight.original"
_WHOLE = "lm_head.weight"


class HeadRows(nn.Module):
    """The rows of the head for image codes, `<boi>` and `<eoi>` (trained), and all others (frozen), as one matrix."""

    def __init__(self, rows: slice):
        super().__init__()
        self.rows = rows

    def forward(self, image: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return torch.cat([others[: self.rows.start], image, others[self.rows.start :]])

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        others = torch.cat([weight[: self.rows.start], weight[self.rows.stop :]])
        # A copy, as a view would keep the memory of the whole head.
        return weight[self.rows].clone(), others


def set_trainable(model: PreTrainedModel, trainable: str) -> None:
    """
    Freeze what the stage does not train, in place.

    Args:
        model ([`NextFlowForCausalLM`]): Not yet wrapped, with all its parameters in one place.
        trainable (`str`): `"all"` leaves the model as it is. `"alignment"` trains the connector and the rows of the
            head that are no text.
    """
    if trainable not in TRAINABLE:
        raise ValueError(f"trainable is {trainable!r}, expected one of {list(TRAINABLE)}")
    if trainable == "all":
        return
    if model.config.tie_word_embeddings:
        raise ValueError(
            "trainable='alignment' trains rows of the head, which are the embedding's too in a model with "
            "tie_word_embeddings=True: untie them with config_overrides.tie_word_embeddings=false"
        )
    # Freeze everything, then free what alignment trains: the connector, and the head's image rows.
    model.requires_grad_(False)
    model.model.connector.requires_grad_(True)
    parametrize.register_parametrization(model.lm_head, "weight", HeadRows(model.config.image_vocabulary))
    image, others = _parts(model)
    image.requires_grad_(True)
    others.requires_grad_(False)
    model.register_load_state_dict_pre_hook(_cut_head)


def is_head_cut(model: nn.Module) -> bool:
    """Whether the head is kept as two parts, of which one is trained."""
    return parametrize.is_parametrized(model.get_output_embeddings(), "weight")


def join_head(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` of a model whose head is cut, with the head in one piece."""
    state_dict = dict(state_dict)
    image, others = state_dict.pop(f"{_PARTS}0"), state_dict.pop(f"{_PARTS}1")
    state_dict[_WHOLE] = model.lm_head.parametrizations.weight[0](image, others)
    return state_dict


def _parts(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    parts = model.lm_head.parametrizations.weight
    return parts.original0, parts.original1


def _cut_head(model: nn.Module, state_dict: dict[str, torch.Tensor], *_) -> None:
    """Load a head in one piece, as every checkpoint has it."""
    if _WHOLE in state_dict:
        image, others = model.lm_head.parametrizations.weight[0].right_inverse(state_dict.pop(_WHOLE))
        state_dict[f"{_PARTS}0"], state_dict[f"{_PARTS}1"] = image, others
