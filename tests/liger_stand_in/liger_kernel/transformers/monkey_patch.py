import inspect

from . import LigerRMSNorm


MODEL_TYPE_TO_APPLY_LIGER_FN = {}


def _apply_liger_kernel_to_instance(model, **kwargs):
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if apply is not None:
        known = inspect.signature(apply).parameters
        apply(model=model, **{name: value for name, value in kwargs.items() if name in known})


def _patch_rms_norm_module(module):
    module.__dict__["forward"] = LigerRMSNorm.forward.__get__(module)


def _patch_swiglu_module(module, liger_module):
    module.__dict__["forward"] = liger_module.forward.__get__(module)
