"Notebook 03c: several processes do what one would; the loss is that of the paper."
import subprocess, sys
import numpy as np
import pytest
import torch
from torch.nn import functional as F
import video_vlm.contrast as C

def parts(B=6, seed=0):
    torch.manual_seed(seed)
    model = C.Contrast(8, width=16)
    return model, torch.randn(2*B, 3, 8), [f"a {c} thing number {i}" for i, c in enumerate(["red", "blue"]*(B//2))]

def test_loss_is_that_of_the_paper():
    "Written out pair by pair (SigLIP, algorithm 1)."
    model, x, texts = parts()
    v, t = model.clips([2]*6, tokens=x), model.texts(texts)
    want = sum(-F.logsigmoid((1 if i == j else -1)*(10*v[i] @ t[j]-10)) for i in range(6) for j in range(6))/6
    assert torch.allclose(model(texts, [2]*6, tokens=x), want, atol=1e-5)

def test_learns_to_tell_clips_apart():
    model, x, texts = parts()
    batch = dict(texts=texts, groups=[2]*6, tokens=x)
    log = C.train_contrast(model, iter([batch]*150), steps=150, lr=3e-3)
    assert log[-1][1] < .5*log[0][1]
    v, t = model.clips([2]*6, tokens=x).detach().numpy(), model.texts(texts).detach().numpy()
    assert C.recall(v, t, (1,))["recall@1"] == 1.

@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    "Loss and every gradient of two processes with three clips each equal those of one with six."
    code = '''
import sys, torch, torch.distributed as dist
sys.path.insert(0, HERE)
import test_contrast as t, video_vlm.contrast as C
dist.init_process_group("gloo"); r = dist.get_rank()
model, x, texts = t.parts()
m = torch.nn.parallel.DistributedDataParallel(model)
loss = m(texts[r*3:r*3+3], [2]*3, tokens=x[r*6:r*6+6]); loss.backward()
mean = loss.detach().clone(); dist.all_reduce(mean); mean /= 2
C.world = lambda: (0, 1)
one, x, texts = t.parts(); alone = one(texts, [2]*6, tokens=x); alone.backward()
assert torch.allclose(mean, alone, atol=1e-5), (mean, alone)
for (n, p), q in zip(model.named_parameters(), one.parameters()): assert torch.allclose(p.grad, q.grad, atol=1e-5), n
print("same", r); dist.destroy_process_group()
'''
    from pathlib import Path
    (tmp_path/"w.py").write_text(code.replace("HERE", repr(str(Path(__file__).parent))))
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29631", str(tmp_path/"w.py")], capture_output=True, text=True, timeout=900)
    assert r.returncode == 0 and r.stdout.count("same") == 2, r.stderr[-3000:]
