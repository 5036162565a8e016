"""After `import nextflow_hf`, transformers' auto classes, diffusers' loader, peft and Liger know NextFlow.

Registering takes our classes, and those take torch. So that `import nextflow_hf` itself stays free of them, a library
that is not imported yet gets its registration when it is. The one file that touches private tables: diffusers' of
loadable libraries and of auto pipelines, Liger's of model types.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_transformers() -> None:
    """Enter the classes into transformers' auto classes."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )
    from transformers.models.auto import modeling_auto

    # From the modules, not from the packages: those may be half imported when this runs.
    from .modeling_nextflow.configuration_nextflow import NextFlowConfig, NextFlowVisionTokenizerConfig
    from .modeling_nextflow.modeling_nextflow import NextFlowForCausalLM, NextFlowModel
    from .modeling_nextflow.modeling_nextflow_conditional_generation import NextFlowForConditionalGeneration
    from .modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
    from .processing.image_processing_nextflow import NextFlowImageProcessor, NextFlowImageProcessorPil
    from .processing.processing_nextflow import NextFlowProcessor

    AutoConfig.register(NextFlowConfig.model_type, NextFlowConfig, exist_ok=True)
    AutoConfig.register(NextFlowVisionTokenizerConfig.model_type, NextFlowVisionTokenizerConfig, exist_ok=True)
    AutoModel.register(NextFlowConfig, NextFlowModel, exist_ok=True)
    AutoModel.register(NextFlowVisionTokenizerConfig, NextFlowVisionTokenizer, exist_ok=True)
    AutoModelForCausalLM.register(NextFlowConfig, NextFlowForCausalLM, exist_ok=True)
    AutoModelForMultimodalLM.register(NextFlowConfig, NextFlowForConditionalGeneration, exist_ok=True)
    AutoModelForImageTextToText.register(NextFlowConfig, NextFlowForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(NextFlowConfig, NextFlowProcessor, exist_ok=True)
    backends: dict[str, type] = {"pil": NextFlowImageProcessorPil}
    if NextFlowImageProcessor is not NextFlowImageProcessorPil:  # an alias where torchvision is missing
        backends["torchvision"] = NextFlowImageProcessor
    AutoImageProcessor.register(NextFlowConfig, image_processor_classes=backends, exist_ok=True)

    # `transformers serve` knows what a model takes by this table of names alone.
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[NextFlowConfig.model_type] = "NextFlowForConditionalGeneration"

    # `save_pretrained` then writes the code beside the weights: the folder also loads where this package is missing.
    for config in (NextFlowConfig, NextFlowVisionTokenizerConfig):
        config.register_for_auto_class()
    NextFlowModel.register_for_auto_class("AutoModel")
    NextFlowForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    NextFlowForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")
    NextFlowVisionTokenizer.register_for_auto_class("AutoModel")
    NextFlowProcessor.register_for_auto_class()
    for backend in backends.values():
        backend.register_for_auto_class()


def register_with_diffusers() -> None:
    """Let diffusers' loader and its namespace know the pipelines and their components."""
    import diffusers
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
    from transformers import ImageProcessingMixin, PreTrainedModel, ProcessorMixin

    from .pipelines.pipeline_nextflow import NextFlowPipeline
    from .pipelines.pipeline_nextflow_diffusion_decoder import NextFlowDiffusionDecoderPipeline

    # The loader imports only libraries of this table, and saves the others' classes under their full module path.
    # It looks the base classes up as attributes of the library itself, with no default.
    library = sys.modules["nextflow_hf"]
    bases = (diffusers.ModelMixin, PreTrainedModel, ProcessorMixin, ImageProcessingMixin)
    for base in bases:
        setattr(library, base.__name__, base)
    LOADABLE_CLASSES["nextflow_hf"] = {base.__name__: ["save_pretrained", "from_pretrained"] for base in bases}
    # `DiffusionPipeline.from_pretrained` looks `_class_name` up in `diffusers` alone.
    diffusers.NextFlowPipeline = NextFlowPipeline
    diffusers.NextFlowDiffusionDecoderPipeline = NextFlowDiffusionDecoderPipeline


def register_with_auto_pipelines() -> None:
    """Enter the pipeline into diffusers' `AutoPipelineForText2Image` and `AutoPipelineForImage2Image`."""
    from diffusers.pipelines import auto_pipeline

    from .pipelines.pipeline_nextflow import NextFlowPipeline

    # One class samples and edits. diffusers looks a class up by its name, through all tables, for its key in this one.
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["nextflow"] = NextFlowPipeline
    auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["nextflow"] = NextFlowPipeline


def register_with_peft() -> None:
    """Tell PEFT which matrices a `LoraConfig()` without `target_modules` adapts."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # Every matrix of the decoder, for a `LoraConfig()` that names none. Not the connector, which is small and new and
    # best trained whole (training/transformer/adapters.py). "nextflow" is the model type, not a class of ours.
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["nextflow"] = names


def register_with_liger() -> None:
    """Let Liger's `apply_liger_kernel` know the model type."""
    from .training.transformer.liger import MODEL_TYPE, apply_liger_kernel_to_nextflow

    # Not by import: this runs at the end of that module's own, before its package has it as an attribute.
    monkey_patch = sys.modules["liger_kernel.transformers.monkey_patch"]
    monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[MODEL_TYPE] = apply_liger_kernel_to_nextflow


class _RegisteringLoader(Loader):
    """Executes a module as its own loader does, then registers."""

    def __init__(self, loader: Loader, register: Callable[[], None]):
        self.loader = loader
        self.register = register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # hide this loader from the module
        self.loader.exec_module(module)
        self.register()


class _RegisteringFinder(MetaPathFinder):
    """
    Lets a registration run at the end of the import of its library, where that was not imported before.

    Sound because `transformers` and `diffusers` are lazy packages: where their `__init__` ends, none of their
    submodules is half imported. Of ours, only the `__init__` of modeling, processing or pipelines can be: each opens
    with the import of the library that it registers with (tests/test_packaging.py checks it), so its own modules are
    not imported yet.
    """

    def __init__(self, pending: dict[str, Callable[[], None]]):
        self.pending = pending

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.pending:
            return None
        # Being found is not being imported (`importlib.util.find_spec` asks, too): nothing is forgotten here.
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                spec.loader = _RegisteringLoader(spec.loader, self.pending[fullname])
                return spec
        return None


def install() -> None:
    """Register with what is imported already now, with the rest when it is imported."""
    registrations = {
        "transformers": register_with_transformers,
        "diffusers": register_with_diffusers,
        "diffusers.pipelines.auto_pipeline": register_with_auto_pipelines,
        "peft": register_with_peft,
        "liger_kernel.transformers.monkey_patch": register_with_liger,
    }
    imported = [registrations.pop(name) for name in [*registrations] if name in sys.modules]
    # Before these: what registers with diffusers imports transformers, which may not be imported yet.
    sys.meta_path.insert(0, _RegisteringFinder(registrations))
    for register in imported:
        register()
