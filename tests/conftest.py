import os
import random

import numpy as np
import pytest
import torch


if not torch.accelerator.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton, and with it Liger, is imported
torch.set_num_threads(1)  # tiny models; the workers of pytest-xdist share the cores


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, and can ask for the seed it came from."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    """Folder of a toy pipeline."""
    from toy_pipeline import toy_pipeline

    folder = tmp_path_factory.mktemp("model") / "toy"
    toy_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def command_line(capsys, tmp_path, monkeypatch):
    """A `CommandLine` in a folder of its own."""
    from command_line import CommandLine

    monkeypatch.chdir(tmp_path)
    return CommandLine(capsys)


# File -> the mark of its tests. What is not here is the core, which `make check` runs.
MARKS = {
    "test_app_browser.py": "browser",
    "test_atomic.py": "process",
    "test_batch_encoder.py": "slow",
    "test_capabilities_benchmark.py": "slow",
    "test_cli_info.py": "process",
    "test_convert_command.py": "slow",
    "test_data_description.py": "slow",
    "test_diffusers_citizenship.py": "process",
    "test_diffusion_decoder_base_models.py": "slow",
    "test_diffusion_decoder_metrics.py": "slow",
    "test_diffusion_decoder_trainer.py": "slow",
    "test_docs.py": "slow",
    "test_evaluate.py": "slow",
    "test_every_schedule.py": "slow",
    "test_examples.py": "process",
    "test_extraction.py": "slow",
    "test_extraction_shards.py": "process",
    "test_folders.py": "slow",
    "test_from_nothing.py": "slow",
    "test_grpo_script.py": "process",
    "test_grpo_sharded.py": "process",
    "test_grpo_trainer.py": "slow",
    "test_hub_export.py": "slow",
    "test_image_loading.py": "process",
    "test_interruptions.py": "process",
    "test_liger.py": "process",
    "test_muon.py": "process",
    "test_notebooks.py": "slow",
    "test_packaging.py": "process",
    "test_quantization.py": "slow",
    "test_reconstruction_report.py": "slow",
    "test_remote_code.py": "process",
    "test_serving.py": "process",
    "test_serving_command.py": "process",
    "test_serving_engines.py": "process",
    "test_serving_lmms_eval.py": "process",
    "test_serving_ray.py": "process",
    "test_sft_trainer.py": "slow",
    "test_sharded_training.py": "process",
    "test_start_up.py": "process",
    "test_tensor_parallel.py": "process",
    "test_tokenizer_trainer.py": "slow",
    "test_train_command.py": "process",
    "test_train_decoder.py": "slow",
    "test_train_tokenizer.py": "process",
    "test_training_equivalence.py": "process",
    "test_training_failures.py": "process",
    "test_training_keys.py": "slow",
    "test_user_way.py": "slow",
    "test_worlds.py": "slow",
    "test_worlds_judge.py": "slow",
    "test_worlds_shapes.py": "slow",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if mark := MARKS.get(item.path.name):
            item.add_marker(mark)
