"""Rewards for [`NextFlowGRPOTrainer`]: what an image is worth, given what was asked.

A reward is any callable, also an `async` one, that takes keyword arguments and gives one number per image:

    def reward(images, prompts, **columns) -> list[float | None]

`images` are the images sampled, `prompts` what the data set's `prompt` column holds, `codes` the image codes,
`source_images` the images a prompt came with (PIL, as those sampled), `thoughts` the text written before the image;
every other column of the data set comes under its own name. `None` says that the reward does not apply to a sample.
NaN says that it failed: the sample is reported and left out. `log_metric(name, value)` and `log_extra(column, values)`
are TRL's; with mask propagation `report_masks(masks)` hands in one boolean (height, width) array, or None, per image:
the pixels that the reward looked at, which are carried to the codes behind them.

Several rewards are weighed by `reward_weights`, which also puts them on one scale: an offset makes no difference to an
advantage. Here are those that need no further library. By their own modules: `.preference` and `.hpsv3` (weights from
the Hub). A world brings its own: `nextflow_hf.worlds.shapes:reward`.
"""

from .checks import check_rewards
from .ocr import OCRReward, OCRWord, RapidOCREngine
from .vlm_judge import VLMJudge


__all__ = ["OCRReward", "OCRWord", "RapidOCREngine", "VLMJudge", "check_rewards"]
