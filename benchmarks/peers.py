"""What next-scale prediction costs beside other ways to generate an image: one process, one device, one width.

    python benchmarks/peers.py                       # 256 and 512 pixels timed, 1,024 by FLOPs alone; minutes
    python benchmarks/peers.py --pixels 256 --width 512x8 --repeats 1

Random weights, float32 on a CPU and bfloat16 on CUDA. All have the width and the depth of ours, a prompt of 64 tokens,
guidance 3 and 32,768 codes, and run the code that their libraries ship, unchanged:

- NextFlow: `generate_images` after `fuse_qkv_projections()`; "transformers' layers": before that; "without cache": our
  own forward on the whole sequence so far, at every scale.
- raster: `Qwen2ForCausalLM.generate` of one code for each 16 x 16 pixels, guided by a logits processor.
- MMDiT: diffusers' `SD3Transformer2DModel` (latents of 8 x 8 pixels, patches of 2), 18 and 28 guided steps.
- Janus: `JanusForConditionalGeneration.generate(generation_mode="image")`, codes of 16 x 16 pixels.
- Emu3: `Emu3ForConditionalGeneration.generate` of one code for each 8 x 8 pixels, guided by transformers' processor.

Nothing is decoded. Long loops are run in part and scaled: raster models for 32 codes at the middle of their context,
less their prefill; MMDiT for two steps. Rows repeat in turn and the best counts, as other work only adds. FLOPs, those
of attention included, are counted while the same code runs. A CPU's second is one of the process's own, on one thread.
"reached" is the ratio of times over that of FLOPs.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
import transformers
from common import seconds, where_and_when
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula
from transformers import LogitsProcessor

from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from nextflow_hf.modeling_nextflow.sampling_nextflow import random_numbers, scale_plan
from nextflow_hf.processing.scale_schedule_nextflow import ScaleSchedule


WIDTHS = {"512x8": (512, 8, 8, 1, 2720), "1024x16": (1024, 16, 16, 2, 5440)}  # hidden, layers, heads, of keys, ffn
TEXT, CODES, PROMPT, PART = 512, 32768, 64, 32  # PART: codes of a raster model that are run
SAMPLING = {"guidance_scale": 3.0, "top_k": 900, "top_p": 0.96}
Run = Callable[[], object]
Work = tuple[Run, Run | None, float]  # what is run, what of it does not count, and how often the rest makes the whole


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def attention_flops(query: torch.Size, key: torch.Size, *args: object, **kwargs: object) -> int:
    """PyTorch counts none of the CPU's kernel."""
    return 4 * query.numel() * key[2]


class Contestants:
    """Models of one width, and what each of them does for an image of so many pixels."""

    def __init__(self, width: str, device: str):
        self.hidden, self.layers, self.heads, self.key_heads, self.ffn = WIDTHS[width]
        self.device, self.dtype = device, torch.bfloat16 if device == "cuda" else torch.float32
        self.body = {
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "max_position_embeddings": 32768,
        }
        tokens = {"boi_token_id": TEXT + CODES, "eoi_token_id": TEXT + CODES + 1, "image_token_id": 3}
        sizes = {"vocab_size": TEXT + CODES + 2, "text_vocab_size": TEXT, "codebook_size": CODES}
        self.config = NextFlowConfig(**self.body, **sizes, **tokens, pad_token_id=0, eos_token_id=2)
        self.ours = self._make(NextFlowForCausalLM, self.config)
        self.ours.fuse_qkv_projections()
        self.head_share = CODES * self.hidden / (sum(p.numel() for p in self.ours.model.layers.parameters()))

    def _make(self, kind: type, config: object) -> torch.nn.Module:
        torch.manual_seed(0)
        with torch.device(self.device):
            return kind._from_config(config, dtype=self.dtype, attn_implementation="sdpa").eval()

    def _prompts(self, pixels: int) -> dict[str, torch.Tensor]:
        schedule = ScaleSchedule()
        grids = schedule.grids((16, 16), schedule.num_scales(pixels))
        padded = torch.tensor([*grids, *[(0, 0)] * (self.config.max_scales - len(grids))], device=self.device)
        ids = torch.randint(5, 500, (2, PROMPT), generator=torch.Generator().manual_seed(0)).to(self.device)
        ids[:, -1] = self.config.boi_token_id
        return {"input_ids": ids[:1], "negative_input_ids": ids[1:], "image_grids": padded[None]}

    def nextflow(self, pixels: int, *, fused: bool = True) -> Work:
        model = self.ours
        if not fused:
            model = copy.deepcopy(model)
            model.unfuse_qkv_projections()
        generate = partial(model.generate_images, **self._prompts(pixels), **SAMPLING)
        return lambda: generate(generator=torch.Generator().manual_seed(0)), None, 1

    def without_cache(self, pixels: int) -> Work:
        inputs = self._prompts(pixels)
        schedule = ScaleSchedule()
        grids = schedule.grids((16, 16), schedule.num_scales(pixels))
        prompts = torch.cat([inputs["input_ids"], inputs["negative_input_ids"]])

        def run() -> torch.Tensor:
            codes = torch.zeros(1, 0, dtype=torch.long, device=self.device)
            for count, step in enumerate(scale_plan(grids, **SAMPLING), start=1):
                (height, width), cells = step.grid, sum(height * width for height, width in grids[1:count])
                ids = torch.cat([prompts, prompts.new_full((2, cells), self.config.image_token_id)], dim=1)
                hidden = self.ours.model(
                    input_ids=ids,
                    image_codes=codes.flatten().repeat(2),
                    image_grids=inputs["image_grids"].expand(2, -1, -1),
                    use_cache=False,
                ).last_hidden_state[:, -height * width :]
                logits = self.ours.guided_logits([hidden], step, 1, self.ours.is_fused)
                numbers = random_numbers([], 1, height * width, hidden.device)
                codes = torch.cat([codes, self.ours.sample_scale(logits, step, numbers)], dim=1)
            return codes

        return run, None, 1

    def raster(self, pixels: int) -> Work:
        config = transformers.Qwen2Config(vocab_size=CODES, tie_word_embeddings=False, **self.body)
        model, count = self._make(transformers.Qwen2ForCausalLM, config), (pixels // 16) ** 2
        ids = torch.randint(0, 500, (2, PROMPT + (count - PART) // 2), device=self.device)
        return *self._generate(model, ids, logits_processor=[Guidance()]), count / PART

    def janus(self, pixels: int) -> Work:
        """6 x 6 codes, less one alone."""
        count, some = (pixels // 16) ** 2, 36
        ids = torch.randint(5, 500, (1, PROMPT + (count - some) // 2), device=self.device)
        return self._janus(ids, 6), self._janus(ids, 1), count / (some - 1)

    def _janus(self, ids: torch.Tensor, side: int) -> Run:
        text = {"model_type": "llama", "vocab_size": 1024, **self.body}
        vision = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16 * side,
                  "num_image_tokens": side * side,
                  "patch_size": 16, "projection_dim": self.hidden, "hidden_dropout_rate": 0.0, "depth": 1}  # fmt: skip
        codes = {"embed_dim": 8, "num_embeddings": CODES, "double_latent": False, "latent_channels": 64,
                 "num_patches": side, "base_channels": 32, "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 1,
                 "projection_dim": self.hidden, "image_token_embed_dim": self.hidden,
                 "num_hidden_layers": 1}  # fmt: skip
        config = transformers.JanusConfig(text_config=text, vision_config=vision, vq_config=codes)
        model = self._make(transformers.JanusForConditionalGeneration, config)
        model.generation_config.generation_kwargs = {"boi_token_id": 4}
        settings = {"generation_mode": "image", "do_sample": True, "top_k": 900, "guidance_scale": 3.0}
        mask, length = torch.ones_like(ids), ids.shape[1] + side * side
        return lambda: model.generate(ids, attention_mask=mask, pad_token_id=0, max_length=length, **settings)

    def emu3(self, pixels: int) -> Work:
        tokens = {"<image>": 3, **{f"<|visual token {index:06d}|>": TEXT + index for index in range(CODES)}}
        text = {"vocab_size": TEXT + CODES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **self.body}
        codes = {
            "codebook_size": CODES,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "num_res_blocks": 1,
        }
        config = transformers.Emu3Config(text_config=text, vq_config=codes, vocabulary_map=tokens)
        model, count = self._make(transformers.Emu3ForConditionalGeneration, config), (pixels // 8) ** 2
        ids = torch.randint(5, 500, (1, PROMPT + (count - PART) // 2), device=self.device)
        return *self._generate(model, ids, guidance_scale=3.0, negative_prompt_ids=ids.flip(1)), count / PART

    def mmdit(self, pixels: int, steps: int = 18) -> Work:
        from diffusers import SD3Transformer2DModel

        torch.manual_seed(0)
        with torch.device(self.device):
            model = SD3Transformer2DModel(
                sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=self.layers,
                attention_head_dim=64, num_attention_heads=self.hidden // 64, joint_attention_dim=self.hidden,
                caption_projection_dim=self.hidden, pooled_projection_dim=self.hidden, pos_embed_max_size=96,
            )  # fmt: skip
        if self.dtype != torch.float32:
            model = model.to(self.dtype)
        model.eval()
        make = partial(torch.randn, device=self.device, dtype=self.dtype)
        latents, text, pooled = (
            make(1, 16, pixels // 8, pixels // 8),
            make(2, PROMPT, self.hidden),
            make(2, self.hidden),
        )

        def run(part: int = 2) -> torch.Tensor:
            sample = latents
            for step in range(part):
                time = torch.full((2,), 1000.0 * (1 - step / steps), device=self.device)
                both = model(sample.repeat(2, 1, 1, 1), text, pooled, time, return_dict=False)[0]
                with_text, without = both.chunk(2)
                sample = sample - (without + 3 * (with_text - without)) / steps
            return sample

        return run, None, steps / 2

    def _generate(self, model: torch.nn.Module, ids: torch.Tensor, **options: object) -> tuple[Run, Run]:
        """`PART` codes after the first, and the first alone."""
        settings = {"do_sample": True, "top_k": 900, "top_p": 0.96, "pad_token_id": 0, "eos_token_id": None, **options}
        generate = partial(model.generate, ids, attention_mask=torch.ones_like(ids), **settings)
        whole, first = (partial(generate, min_new_tokens=count, max_new_tokens=count) for count in (PART + 1, 1))
        return whole, first


class Guidance(LogitsProcessor):
    """Classifier-free guidance of two rows, the second without the prompt."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with_text, without = scores.chunk(2)
        return (without + 3 * (with_text - without)).repeat(2, 1)


CONTESTANTS: dict[str, Callable[[Contestants, int], Work]] = {
    "NextFlow": Contestants.nextflow,
    "NextFlow, transformers' layers": partial(Contestants.nextflow, fused=False),
    "NextFlow without cache": Contestants.without_cache,
    "raster, Qwen2": Contestants.raster,
    "MMDiT, 18 steps": Contestants.mmdit,
    "MMDiT, 28 steps": partial(Contestants.mmdit, steps=28),
    "Janus": Contestants.janus,
    "Emu3": Contestants.emu3,
}


def count_flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def of_work(measure: Callable[[Run], float], work: Work) -> float:
    run, uncounted, times = work
    return (measure(run) - (0 if uncounted is None else measure(uncounted))) * times


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument("--timed-up-to", type=int, default=512, help="larger images by their FLOPs alone")
    parser.add_argument("--width", choices=WIDTHS, nargs="*", default=list(WIDTHS))
    parser.add_argument("--only", choices=CONTESTANTS, nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    print(f"{where_and_when(device)}; the best of {arguments.repeats}\n")
    print("| width | pixels | | s | ratio of times | TFLOP | ratio of FLOPs | reached |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for width in arguments.width:
        makers = Contestants(width, device)
        for pixels in arguments.pixels:
            works = {name: CONTESTANTS[name](makers, pixels) for name in arguments.only}
            flops = {name: of_work(count_flops, work) for name, work in works.items()}  # and warms up
            best = dict.fromkeys(works, float("nan"))
            for _ in range(arguments.repeats if pixels <= arguments.timed_up_to else 0):
                for name, work in works.items():
                    best[name] = min(of_work(partial(seconds, device=device), work), best[name])
            first = arguments.only[0]
            for name in works:
                ratios = best[name] / best[first], flops[name] / flops[first]
                print(
                    f"| {width} | {pixels} | {name} | {best[name]:.2f} | {ratios[0]:.2f} | {flops[name] / 1e12:.3f} | "
                    f"{ratios[1]:.2f} | {ratios[0] / ratios[1]:.0%} |",
                    flush=True,
                )
        print(f"\nThe head over the codes has {makers.head_share:.0%} of the layers' parameters at {width}.\n")


if __name__ == "__main__":
    main()
