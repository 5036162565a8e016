"""`nextflow-hf convert`: what it writes, what a dry run says, how it fails."""

import pytest
import torch
from test_conversion import FAMILIES, save_source
from test_modeling_vision_tokenizer import CODES, PIXEL_DIM, SEMANTIC_DIM, build
from tokenflow_reference import tiny_checkpoint
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from nextflow_hf import cli
from nextflow_hf.conversion import from_tokenflow as tokenflow_module
from nextflow_hf.conversion.from_qwen import from_qwen
from nextflow_hf.conversion.from_tokenflow import from_tokenflow
from nextflow_hf.modeling_nextflow.image_settings_nextflow import PAPER_SAMPLING
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from nextflow_hf.modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer


@pytest.fixture
def tokenflow(tmp_path, monkeypatch):
    """A small checkpoint, and its size among those known."""
    monkeypatch.setitem(tokenflow_module.SCALE_SIDES, ("clip", 16), (1, 2, 4))
    torch.save({"model": tiny_checkpoint("clip", cells=3)}, tmp_path / "tokenflow.pt")
    return tmp_path / "tokenflow.pt"


@pytest.fixture
def vision_tokenizer(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "vision_tokenizer")
    return tmp_path / "vision_tokenizer", model


def words_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"word{index}": index for index in range(90)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), model_max_length=256)
    tokenizer.add_tokens(["<|image_pad|>"], special_tokens=True)  # 90, as in the configurations
    return tokenizer


@pytest.fixture(params=["qwen2.5-vl, tied", "qwen3"])
def qwen(request, tmp_path):
    save_source(request.param, tmp_path / "qwen")
    words_tokenizer().save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen"


def test_tokenflow(tokenflow, tmp_path, capsys):
    output = tmp_path / "new" / "output"
    assert cli.main(["convert", "tokenflow", str(tokenflow), str(output), "--image-size", "16"]) == 0
    loaded = NextFlowVisionTokenizer.from_pretrained(output)
    expected = from_tokenflow(tokenflow, image_size=16)
    assert loaded.config.image_size == 16 and loaded.config.scale_sides == [1, 2, 4]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))
    assert f"{sum(p.numel() for p in loaded.parameters()):,} parameters" in capsys.readouterr().out


def test_tokenflow_in_half_precision_keeps_its_codebooks(tokenflow, tmp_path):
    command = ["convert", "tokenflow", str(tokenflow), str(tmp_path / "output"), "--image-size", "16"]
    assert cli.main([*command, "--dtype", "bfloat16"]) == 0
    loaded = NextFlowVisionTokenizer.from_pretrained(tmp_path / "output")
    assert loaded.pixel_encoder.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.codebook, from_tokenflow(tokenflow, image_size=16).codebook)


def test_tokenflow_dry_run(tokenflow, tmp_path, capsys):
    output = tmp_path / "output"
    assert cli.main(["convert", "tokenflow", str(tokenflow), str(output), "--image-size", "16", "--dry-run"]) == 0
    assert not output.exists()
    lines = capsys.readouterr().out.splitlines()
    ours = "semantic_encoder.encoder.layers.#.self_attn."
    assert (
        "   2 x [576, 192]  encoder_vqkd.transformer.resblocks.#.attn.in_proj_weight -> "
        f"{ours}q_proj.weight + {ours}k_proj.weight + {ours}v_proj.weight"
    ) in lines
    assert "   1 x [192, 20]  encoder_vqkd.proj -> (left behind)" in lines
    assert "images of 16 x 16 pixels, scales [1, 2, 4]" in lines
    model = from_tokenflow(tokenflow, image_size=16)
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert f"{sum(sizes):,} parameters, {4 * sum(sizes) / 1e9:.2f} GB" in lines


def test_qwen(qwen, vision_tokenizer, tmp_path):
    folder, tokenizer = vision_tokenizer
    output = tmp_path / "output"
    command = ["convert", "qwen", str(qwen), "--vision-tokenizer", str(folder), str(output)]
    assert cli.main([*command, "--max-shard-size", "20KB"]) == 0
    assert len(list(output.glob("*.safetensors"))) > 1
    loaded = NextFlowForCausalLM.from_pretrained(output)
    dims = {"semantic_code_dim": SEMANTIC_DIM, "pixel_code_dim": PIXEL_DIM, "image_token_id": 90, "max_scales": 18}
    expected = from_qwen(qwen, tokenizer.codebook.detach(), config_overrides=dims)
    assert loaded.config.codebook_size == CODES and loaded.config.image_token_id == 90
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))
    torch.testing.assert_close(loaded.model.image_codebook.weight, tokenizer.codebook)
    assert {name: getattr(loaded.generation_config, name) for name in PAPER_SAMPLING} == PAPER_SAMPLING
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id


def test_qwen_dry_run(qwen, vision_tokenizer, tmp_path, capsys):
    output = tmp_path / "output"
    command = ["convert", "qwen", str(qwen), str(output), "--vision-tokenizer", str(vision_tokenizer[0])]
    assert cli.main([*command, "--dry-run"]) == 0
    assert not output.exists()
    printed = capsys.readouterr().out
    tied = "visual." in printed
    assert "   3 x [48, 32]  model.layers.#.mlp.up_proj.weight -> model.layers.#.mlp.up_proj.weight" in printed
    assert f"   1 x [100, 32]  {'model.embed_tokens' if tied else 'lm_head'}.weight -> lm_head.weight" in printed
    assert ("visual.merger.ln_q.weight -> (left behind)" in printed) == tied
    assert f"   1 x [40, 10]  (codebook of {vision_tokenizer[0]}) -> model.image_codebook.weight" in printed
    assert "model.embed_tokens.weight, and 42 new rows" in printed
    assert f"vocabulary of {100 + CODES + 2}: 100 of text from {qwen}, {CODES} codes, <boi> and <eoi>" in printed

    assert cli.main(command) == 0
    count = sum(parameter.numel() for parameter in NextFlowForCausalLM.from_pretrained(output).parameters())
    assert f"{count:,} parameters, {4 * count / 1e9:.2f} GB" in printed


def test_a_dry_run_of_a_model_on_the_hub_reads_headers_alone(vision_tokenizer, tmp_path, monkeypatch, capsys):
    from types import SimpleNamespace

    from nextflow_hf.conversion import assemble
    from nextflow_hf.conversion import from_qwen as module

    model_class, config = FAMILIES["qwen2.5-vl"]
    with torch.device("meta"):
        source = model_class(config())
    tensors = {
        name: SimpleNamespace(dtype="BF16", shape=list(value.shape)) for name, value in source.state_dict().items()
    }
    metadata = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(module, "get_safetensors_metadata", lambda name, revision: metadata)
    monkeypatch.setattr(module.AutoConfig, "from_pretrained", lambda name, revision: source.config)
    monkeypatch.setattr(assemble.AutoTokenizer, "from_pretrained", lambda name, revision: words_tokenizer())
    command = ["convert", "qwen", "Qwen/Some", str(tmp_path / "output"), "--dry-run"]
    assert cli.main([*command, "--vision-tokenizer", str(vision_tokenizer[0])]) == 0
    printed = capsys.readouterr().out
    assert "   3 x [48, 32]  model.language_model.layers.#.mlp.up_proj.weight -> " in printed
    size = int(printed.split(" parameters")[0].split()[-1].replace(",", "")) * 2 / 1e9
    assert f"{size:.2f} GB" in printed


def test_failures_are_said_and_write_nothing(tokenflow, vision_tokenizer, qwen, tmp_path, capsys):
    output = tmp_path / "output"
    assert cli.main(["convert", "tokenflow", str(tmp_path / "nowhere.pt"), str(output)]) == 2
    assert "nextflow-hf convert: no file " in capsys.readouterr().err
    assert cli.main(["convert", "tokenflow", str(tokenflow), str(output), "--image-size", "100", "--dry-run"]) == 2
    assert "image_size is 100, expected one of [224, 256, 16]" in capsys.readouterr().err
    (qwen / "model.safetensors.index.json").unlink()
    command = ["convert", "qwen", str(qwen), "--vision-tokenizer", str(vision_tokenizer[0])]
    for options in ([], ["--dry-run"]):
        assert cli.main([*command, str(output), *options]) == 2
        assert "lacks 1 of 1 files of weights: ['model.safetensors']" in capsys.readouterr().err
    assert not output.exists()

    # never over something: least of all over the checkpoint that is being read
    assert cli.main([*command, str(qwen)]) == 2
    assert f"{qwen} exists and is not an empty folder" in capsys.readouterr().err
    assert cli.main(["convert", "tokenflow", str(tokenflow), str(tokenflow)]) == 2
    assert f"{tokenflow} exists and is not an empty folder" in capsys.readouterr().err
