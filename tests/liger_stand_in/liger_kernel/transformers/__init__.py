import torch
import torch.nn.functional as F


calls: list[str] = []  # which of the names below were used, in order


class LigerRMSNorm(torch.nn.Module):
    def forward(self, hidden_states):
        calls.append("rms_norm")
        return F.rms_norm(hidden_states, hidden_states.shape[-1:], self.weight, self.variance_epsilon)


class LigerSwiGLUMLP(torch.nn.Module):
    def forward(self, x):
        calls.append("swiglu")
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def liger_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    calls.append("rope")
    half = q.shape[-1] // 2
    cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
    rotated = []
    for states in (q, k):
        a, b = states[..., :half], states[..., half:]
        rotated.append(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))
    return tuple(rotated)


def __getattr__(name):  # Liger's package is as lazy
    if name == "_apply_liger_kernel_to_instance":
        from .monkey_patch import _apply_liger_kernel_to_instance

        return _apply_liger_kernel_to_instance
    raise AttributeError(name)
