"""An int8 MLP over several processes, one per device: its layers sharded by torch's parallelize_module.

Run: torchrun --standalone --nproc-per-node 2 examples/torch_distributed.py
(python examples/torch_distributed.py does that itself)
"""

import copy
import os
import sys

import octavo.torch
import torch
import torch.distributed as dist
from octavo.distributed import ColwiseInt8Parallel, RowwiseInt8Parallel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

if "RANK" not in os.environ:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    os.execv(sys.executable, [sys.executable, *launcher, __file__])

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: no need to ask what its name resolves to
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))

torch.manual_seed(0)  # every process builds, or loads, the same model
hidden = 256
model = torch.nn.Sequential(
    torch.nn.Linear(hidden, 4 * hidden), torch.nn.GELU(), torch.nn.Linear(4 * hidden, hidden)
).to(torch.bfloat16)
quantized = octavo.torch.quantize_(copy.deepcopy(model), progress=False)
x = torch.randn(64, hidden, dtype=torch.bfloat16)

# Output features of the first layer are spread over the processes; the second one takes them as they are.
sharded = parallelize_module(copy.deepcopy(quantized), mesh, {"0": ColwiseInt8Parallel(), "2": RowwiseInt8Parallel()})

with torch.no_grad():
    one, many = quantized(x), sharded(x)
    exact = model.float()(x.float())
    up = torch.equal(sharded[0](x), quantized[0](x).chunk(mesh.size(), dim=-1)[dist.get_rank()])
error = [((y.float() - exact).norm() / exact.norm()).item() for y in (one, many)]
if dist.get_rank() == 0:
    print(sharded)
    print(f"{mesh.size()} processes: output features of the first layer equal to one process's: {up}")
    print(f"relative error of the MLP: one process {error[0]:.3g}, {mesh.size()} processes {error[1]:.3g}")
assert up
# Each process has its own scales for the second layer's input, which are at most those of one process.
assert error[1] < 1.1 * error[0]
dist.destroy_process_group()
