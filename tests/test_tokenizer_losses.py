"""The losses on the tokenizer's pixels: what a network sees, and the adversary."""

import sys
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import ConvNextConfig, ConvNextImageProcessorPil, ConvNextModel

from nextflow_hf.training.vision_tokenizer.adversary import Adversary, PatchDiscriminator, adaptive_weight, hinge_loss
from nextflow_hf.training.vision_tokenizer.arguments import NextFlowVisionTokenizerTrainingArguments
from nextflow_hf.training.vision_tokenizer.losses import load_perceptual_loss, perceptual_loss, stack_by_size


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("convnext")
    torch.manual_seed(0)
    ConvNextModel(ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1])).save_pretrained(folder)
    ConvNextImageProcessorPil(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]).save_pretrained(folder)
    return str(folder)


def test_the_distance_is_that_of_unit_features_at_every_stage(backbone):
    fake, real = torch.rand(2, 3, 64, 32) * 2 - 1, torch.rand(2, 3, 64, 32) * 2 - 1
    distance = load_perceptual_loss(backbone)
    model = ConvNextModel.from_pretrained(backbone).eval()
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])

    def features(pixels):
        pixels = ((pixels + 1) / 2 - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            return model(pixels, output_hidden_states=True).hidden_states[1:]

    expected = torch.zeros(2)
    for one, other in zip(features(fake), features(real)):
        for image in range(2):
            # The backbone norms the channels of every stage; the checkpoint has no weights for that.
            first, second = (
                (stage - stage.mean(0)) / (stage.var(0, correction=0) + 1e-6).sqrt()
                for stage in (one[image].flatten(1), other[image].flatten(1))
            )
            cosines = (first * second).sum(0) / first.norm(dim=0) / second.norm(dim=0)
            expected[image] += (2 - 2 * cosines).mean() / 4
    torch.testing.assert_close(distance(fake, real), expected, rtol=1e-4, atol=1e-6)
    assert distance(real, real).abs().max() < 1e-6


def test_only_the_reconstruction_gets_a_gradient(backbone):
    distance = load_perceptual_loss(backbone, layers=[1, 2])
    fake, real = (torch.rand(1, 3, 32, 32, requires_grad=True) for _ in range(2))
    perceptual_loss(distance, [fake], [real]).backward()
    assert fake.grad.abs().sum() > 0 and real.grad is None
    assert all(parameter.grad is None for parameter in distance.parameters())


def test_layers_that_do_not_exist_are_refused(backbone):
    with pytest.raises(ValueError, match=r"perceptual_layers is \[5\], expected indices from 0 to 4"):
        load_perceptual_loss(backbone, layers=[5])


def test_lpips_comes_from_its_package_or_names_the_extra(monkeypatch):
    with pytest.raises(ValueError, match="perceptual_model is 'lpips-vit'"):
        load_perceptual_loss("lpips-vit")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"nextflow-hf\[perceptual\]"):
        load_perceptual_loss("lpips-vgg")

    class LPIPS(nn.Module):  # the package's signature: (n, 1, 1, 1) from pictures in [-1, 1]
        def __init__(self, net: str, verbose: bool):
            super().__init__()
            assert net == "vgg" and not verbose
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return self.weight * (first - second).square().mean((1, 2, 3), keepdim=True)

    package = ModuleType("lpips")
    package.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", package)
    distance = load_perceptual_loss("lpips-vgg")
    assert not distance.weight.requires_grad and not distance.training
    fake, real = [torch.zeros(3, 3, 4, 4), torch.zeros(1, 3, 2, 4)], [torch.ones(3, 3, 4, 4), torch.zeros(1, 3, 2, 4)]
    assert perceptual_loss(distance, fake, real).item() == pytest.approx(3 / 4)


def test_stacks_hold_every_picture_without_its_padding():
    pixels = torch.rand(3, 3, 8, 8)
    stacks = stack_by_size(pixels, [(8, 8), (4, 8), (8, 8)])
    assert torch.equal(stacks[0], pixels[[0, 2]]) and torch.equal(stacks[1], pixels[1:2, :, :4])
    assert stack_by_size(pixels, [(8, 8)] * 3)[0] is pixels


def test_hinge_loss_by_hand():
    real, fake = [torch.tensor([[2.0, 0.0]])], [torch.tensor([[-3.0, 0.5]])]
    assert hinge_loss(real, fake).item() == pytest.approx(((0 + 1) / 2 + (0 + 1.5) / 2) / 2)
    # A picture of more patches counts as much as another.
    mixed = [torch.full((1, 9), 1.0), torch.full((1, 1), -1.0)]
    assert hinge_loss(mixed, mixed).item() == pytest.approx(((0 + 2) / 2 + (2 + 0) / 2) / 2)


def test_the_discriminator_sees_patches_of_one_picture():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=8, num_layers=3)
    pictures = torch.rand(2, 3, 32, 48)
    logits = discriminator(pictures)
    assert logits.shape == (2, 1, 4, 6)
    torch.testing.assert_close(discriminator(pictures[:1]), logits[:1])
    with pytest.raises(ValueError, match=r"images are \(4, 32\) pixels, expected at least 8"):
        discriminator(torch.rand(1, 3, 4, 32))


def make_adversary(learning_rate: float) -> Adversary:
    args = NextFlowVisionTokenizerTrainingArguments(
        use_cpu=True, adam_beta1=0.5, adam_beta2=0.9, discriminator_channels=8, discriminator_layers=2,
        discriminator_learning_rate=learning_rate,
    )  # fmt: skip
    return Adversary(args, Accelerator(cpu=True))


def test_the_adversary_learns_and_the_tokenizer_hears(backbone):
    torch.manual_seed(0)
    adversary = make_adversary(5e-3)
    real, fake = [torch.rand(4, 3, 8, 8)], [torch.zeros(4, 3, 8, 8, requires_grad=True)]
    adversary.generator_loss(fake).backward()
    assert fake[0].grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in adversary.discriminator.parameters())
    fake[0].grad = None
    before = [parameter.clone() for parameter in adversary.discriminator.parameters()]
    adversary.step(learning_rate_factor=1.0, max_grad_norm=1.0)  # nothing was learnt yet
    assert all(map(torch.equal, before, adversary.discriminator.parameters()))
    losses = []
    for _ in range(30):
        losses.append(adversary.learn(fake, real, share=1.0).item())
        adversary.step(learning_rate_factor=1.0, max_grad_norm=1.0)
    assert losses[0] == pytest.approx(1, abs=0.1) and losses[-1] < 0.5
    assert fake[0].grad is None


def test_two_halves_of_a_batch_are_the_batch():
    pictures = torch.rand(2, 4, 3, 8, 8)
    gradients = []
    for parts in (1, 2):
        torch.manual_seed(0)
        adversary = make_adversary(1e-3)
        for fake, real in zip(pictures[0].chunk(parts), pictures[1].chunk(parts)):
            adversary.learn([fake], [real], share=1 / parts)
        gradients.append([parameter.grad for parameter in adversary.discriminator.parameters()])
    for whole, halves in zip(*gradients):
        torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-7)


def test_adaptive_weight_is_the_ratio_of_the_gradients():
    last_layer = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight = adaptive_weight(10 * last_layer.square().sum(), last_layer.sum(), last_layer, Accelerator(cpu=True))
    assert weight.item() == pytest.approx(20 * 5 / (2**0.5 + 1e-4)) and not weight.requires_grad
