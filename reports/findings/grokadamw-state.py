"""grokadamw 0.1.2: the optimizer's state does not survive state_dict() and load_state_dict().

GrokAdamW keeps its moments in param_groups[i]["state"], keyed by the tensor, and not in Optimizer.state. The tensors
themselves are then saved as keys; after a load those keys are copies, the look-up by the live tensor finds nothing, and
step, exp_avg, exp_avg_sq and grok_ema start again from zero. No error, no warning. AdamW is the control.
"""

import io

import torch
from grokadamw import GrokAdamW


def state(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> str:
    found = (optimizer.state or optimizer.param_groups[0].get("state", {})).get(parameter)
    return f"step {int(found['step'])}, exp_avg {found['exp_avg'].item():+.4f}" if found else "none"


def steps(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, *gradients: float) -> None:
    for gradient in gradients:
        parameter.grad = torch.tensor([gradient])
        optimizer.step()


for optimizer_class in (torch.optim.AdamW, GrokAdamW):
    whole = torch.nn.Parameter(torch.ones(1))
    optimizer = optimizer_class([whole], lr=1e-2)
    steps(whole, optimizer, 0.3, 0.2, 0.4)
    torch.save((whole.data, optimizer.state_dict()), file := io.BytesIO())
    print(f"{optimizer_class.__name__}: state_dict()['state'] has {len(optimizer.state_dict()['state'])} entries")

    data, saved = torch.load(io.BytesIO(file.getvalue()))
    parameter = torch.nn.Parameter(data)
    resumed = optimizer_class([parameter], lr=1e-2)
    resumed.load_state_dict(saved)
    print(f"  state when saved: {state(whole, optimizer)}; after the load: {state(parameter, resumed)}")
    steps(whole, optimizer, -0.1)
    steps(parameter, resumed, -0.1)
    print(f"  step 4, uninterrupted: {state(whole, optimizer)}, parameter {whole.item():.6f}")
    print(f"  step 4, resumed:       {state(parameter, resumed)}, parameter {parameter.item():.6f}")
print(f"tensors that have state in the resumed group of one parameter: {len(resumed.param_groups[0]['state'])}")
