"""Arguments of the vision tokenizer's training (§3.1). Inert data."""

from dataclasses import dataclass

from transformers import TrainingArguments

from ..common.refusals import check_arguments, check_numbers


STAGES = ("pixel", "joint", "decoder")
AT_LEAST = {
    "l1_loss_weight": 0, "edge_loss_weight": 0, "perceptual_loss_weight": 0, "adversarial_loss_weight": 0,
    "adversarial_start": 0, "discriminator_channels": 1, "discriminator_layers": 1, "discriminator_learning_rate": 0,
    "continuous_steps": 0, "codebook_init_batches": 0, "codebook_init_iterations": 0, "dead_code_steps": 0,
    "dead_code_until": 0, "ema_decay": 0,
}  # fmt: skip


@dataclass
class NextFlowVisionTokenizerTrainingArguments(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] plus what the tokenizer's training needs. The paper specifies the stages and
    none of the numbers.

    Args:
        stage (`str`, *optional*, defaults to `"joint"`):
            `"pixel"`: the pixel branch alone, the semantic one frozen and without a say in the search. `"joint"`:
            everything, distilled from the teacher. `"decoder"`: the pixel decoder alone, on fixed codes (§3.1).
        l1_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the mean absolute error, beside the model's own mean squared error.
        edge_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the mean absolute error of the image gradients: sharp outlines.
        perceptual_model (`str`, *optional*):
            Network of the perceptual loss: `"lpips-vgg"` (or -alex, -squeeze) of the package lpips, or a vision model
            of transformers by Hub id or folder. Without one there is no perceptual loss.
        perceptual_layers (`list[int]`, *optional*):
            Stages of that vision model that are compared; by default four, evenly spread.
        perceptual_loss_weight (`float`, *optional*, defaults to 1.0): Weight of the perceptual loss.
        adversarial_loss_weight (`float`, *optional*, defaults to 0.0):
            Weight of the adversarial loss (hinge, PatchGAN). 0 trains without a discriminator.
        adversarial_adaptive (`bool`, *optional*, defaults to `False`):
            Whether that weight is further multiplied by VQGAN's ratio of gradients at the decoder's last layer.
        adversarial_start (`int`, *optional*, defaults to 0):
            Step at which the discriminator begins to learn, and to be listened to.
        discriminator_channels (`int`, *optional*, defaults to 64): Width of its first layer.
        discriminator_layers (`int`, *optional*, defaults to 3): Its convolutions of stride two.
        discriminator_learning_rate (`float`, *optional*):
            Learning rate of its own Adam, times the factor of `lr_scheduler_type`. Defaults to `learning_rate`.
        continuous_steps (`int`, *optional*, defaults to 0):
            Steps that train the branches as plain autoencoders, before the codebook is initialised from what they
            have learnt and quantising begins (not specified by the paper).
        codebook_init_batches (`int`, *optional*, defaults to 8):
            Batches whose features the codebook is initialised from when quantising begins. 0 keeps it as it is.
        codebook_init_iterations (`int`, *optional*, defaults to 5):
            k-means iterations of that initialisation. 0 picks features at random.
        dead_code_steps (`int`, *optional*, defaults to 100):
            A code that was not used for so many steps restarts from a feature of the current batch. 0 turns it off.
        dead_code_until (`float`, *optional*, defaults to 0.8):
            Share of the training after which codes no longer restart, so that the decoder can settle.
        ema_decay (`float`, *optional*):
            Decay of an exponential moving average of the weights; evaluation and the saved model then use it.
    """

    stage: str = "joint"
    l1_loss_weight: float = 1.0
    edge_loss_weight: float = 1.0
    perceptual_model: str | None = None
    perceptual_layers: list[int] | None = None
    perceptual_loss_weight: float = 1.0
    adversarial_loss_weight: float = 0.0
    adversarial_adaptive: bool = False
    adversarial_start: int = 0
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    discriminator_learning_rate: float | None = None
    continuous_steps: int = 0
    codebook_init_batches: int = 8
    codebook_init_iterations: int = 5
    dead_code_steps: int = 100
    dead_code_until: float = 0.8
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        check_arguments(self)
        check_numbers(self, AT_LEAST)
        super().__post_init__()
        if self.stage not in STAGES:
            raise ValueError(f"stage is {self.stage!r}, expected one of {STAGES}")
        if self.fp16 and self.adversarial_loss_weight:
            raise ValueError("fp16 scales the tokenizer's loss and not the discriminator's, expected bf16 or neither")
        # The collator makes the model's inputs; a data set may hold images, which are no argument of `forward`.
        self.remove_unused_columns = False

    @property
    def trains_codebook(self) -> bool:
        """Whether this stage trains the codebook."""
        return self.stage != "decoder"
