"Preference: claims against facts, judges against gold, a run that is killed, one encoding for both answers, and TRL's trainers on the same data."
import json, math, signal, subprocess, sys, time
from importlib.resources import files
from pathlib import Path
import numpy as np
import pytest
import torch
from video_vlm import preference as P
from video_vlm.encoder import EncoderConfig, VideoEncoder, VisualTokens
from video_vlm.model import add_lora, assemble, save_checkpoint, tiny, tiny_tokenizer, load_model
from video_vlm.world import CAPTIONS, captions, facts, make_scene

WORDS = "a red circle is here. the blue star moves left, then spins. yes no what happens? describe the video."

def small(seed=0):
    "(model, processor): random weights, text width 64."
    from transformers import AutoModelForCausalLM
    torch.manual_seed(seed)
    tok = tiny_tokenizer([WORDS]*50, 512)
    enc = EncoderConfig(tower=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8), pool="mean", spatial=2, group=2)
    return assemble(VideoEncoder(enc), AutoModelForCausalLM.from_config(tiny(len(tok), 64, 2).text_config), tok)

def video(i, groups=3):
    x = np.random.default_rng(i).standard_normal((groups, 4, 32)).astype(np.float32)
    return VisualTokens(x, np.arange(groups)/2, np.arange(1, groups+1)/2, f"v{i}")

def pairs(n, with_video=True, seed=0):
    rng, words = np.random.default_rng(seed), WORDS.replace(".", "").replace(",", "").split()
    say = lambda: " ".join(rng.choice(words, rng.integers(2, 9)))
    return [P.Pair(f"v{k//2}" if with_video else "", say(), say(), say()+" no") for k in range(n)]

look = lambda v: video(int(v[1:]))

def test_captions_of_the_world_are_true_and_changed_ones_are_not():
    for k in range(100):
        scene = make_scene(k, "hard"); truth = facts(scene)
        for text in captions(scene):
            c = P.check_caption(text, truth)
            assert c["wrong"] == 0 and c["told"] == c["facts"] == len(scene.things)+len(scene.events), (text, c)
            said = P.claims(text)
            for gone in said:
                left = P.claims(P.without(text, [gone]))
                assert gone not in left and {c.text for c in left} <= {c.text for c in said}
                assert P.without(text, [gone]) == P.UNSURE or any(P.without(text, [gone]).lower().startswith(f.split("{")[0].lower()) for f in CAPTIONS)
        other = next(f"{c} circle" for c in ("red", "green", "blue", "cyan", "white") if f"{c} circle" not in truth["objects"])
        assert P.check_caption(f"{captions(scene)[0]} There is a {other}.", truth)["objects_wrong"] == 1
        assert P.check_caption(captions(scene)[0]+" "+truth["events"][0]["phrase"], truth)["events_wrong"] == 1      # it happened once

def test_the_constitution_comes_with_the_package_and_says_what_is_missing(tmp_path):
    rules = P.load_constitution()
    assert len(rules) >= 5 and all(r.check.endswith("?") for r in rules) and (files("video_vlm")/"constitution.md").is_file()
    (tmp_path/"mine.md").write_text("# Mine\n\n## short\nSay little.\nCheck: Is it long?\n")
    with pytest.raises(P.PreferenceError, match="short.*Mend"): P.load_constitution(tmp_path/"mine.md")
    (tmp_path/"mine.md").write_text("# Mine\n\n## short\nSay little.\nCheck: Is it long?\nMend: Shorten it.\n")
    assert P.load_constitution(tmp_path/"mine.md")[0] == P.Principle("short", "Say little.", "Is it long?", "Shorten it.")
    with pytest.raises(P.PreferenceError, match="does not exist"): P.load_constitution(tmp_path/"none.md")

def test_facts_teach_only_what_the_model_doubts():
    "Wrong and doubted is left out; wrong and believed stays; where all is true, the caption that lacks something loses."
    truth = dict(objects=["red circle", "blue star"], events=[dict(phrase="the red circle spins")])
    text = "There is a red circle, a blue star and a green ring; the red circle spins, then the blue star bounces."
    doubts = {"green ring": .1, "red circle": .3}
    teach = P.by_facts({"v": truth}, lambda v, t: [(c, doubts.get(c.text, .9)) for c in P.claims(t)])
    revised, found = teach("v", "?", [text, text])
    first, fuller = found
    assert first.rejected == text and {c.text for c in P.claims(text)}-{c.text for c in P.claims(first.chosen)} == {"green ring"} and revised == [p.chosen for p in found]
    assert fuller.chosen == text and P.check_caption(fuller.rejected, truth)["told"] < 3      # a wrong claim that it believes in is no lesson: the text as it was against one that lacks a truth
    right = "There is a red circle and a blue star; the red circle spins."
    (only,) = teach("v", "?", [right])[1]
    assert only.chosen == right and P.check_caption(only.rejected, truth)["wrong"] == 0 and P.check_caption(only.rejected, truth)["told"] < 3
    assert teach("v", "?", [right])[1] == [only] and teach("v", "?", ["There is a green ring."]) == ([], [])

def test_kappa_is_sklearns_and_its_interval_covers():
    from sklearn.metrics import cohen_kappa_score
    rng, hits, n, p = np.random.default_rng(0), 0, 40, .85
    for _ in range(400):
        gold = {i: "ab"[x] for i, x in enumerate(rng.integers(0, 2, n))}
        said = {i: g if rng.random() < p else "ba"["ab".index(g)] for i, g in gold.items()}
        a = P.agreement(said, gold)
        hits += a["kappa_ci95"][0] <= 2*p-1 <= a["kappa_ci95"][1]
    assert abs(a["kappa"]-cohen_kappa_score(list(said.values()), list(gold.values()))) < 1e-9
    assert hits/400 > .92
    perfect = P.agreement(gold, gold)
    assert perfect["kappa"] == 1 and perfect["kappa_ci95"][0] < .9           # forty in a row are not certainty

def test_a_judge_that_likes_the_first_side_is_caught():
    rng = np.random.default_rng(1)
    rows = [dict(id=str(i), video="", prompt="", a="good" if rng.random() < .5 else "bad", b="x") for i in range(200)]
    knows = lambda v, q, a, b: float(a == "good" or b == "bad")
    biased = lambda v, q, a, b: 1. if rng.random() < .6 else knows(v, q, a, b)
    honest, found = P.swap_test(knows, rows), P.swap_test(biased, rows)
    assert honest["same"] == 1 and honest["first"] == .5
    assert found["first_ci95"][0] > .6 and found["same_ci95"][1] < .75

def test_gold_goes_out_and_comes_back(tmp_path):
    ps = pairs(60)
    rows = P.gold_rows(ps, 20)
    assert len(rows) == 20 and len({r["video"] for r in rows}) == 20
    left = sum(r["a"] == next(p.chosen for p in ps if p.id == r["id"]) for r in P.gold_rows(ps, 30))
    assert 5 < left < 25                                                     # sides are dealt, not given away
    P.save_gold([{**r, "better": ""} for r in rows], tmp_path/"empty.jsonl")
    assert P.load_gold(tmp_path/"empty.jsonl") == {}
    tasks = json.loads(P.save_gold(rows, tmp_path/"tasks.json", url=lambda v: f"http://here/{v}.mp4").read_text())
    assert tasks[0]["data"]["video"].startswith("http://here/")
    vote = lambda *what: dict(result=[dict(type="pairwise", value=dict(selected=w)) if w in ("left", "right") else dict(type="choices", value=dict(choices=[w])) for w in what])
    tasks[0]["annotations"] = [vote("left"), vote("left"), vote("right")]
    tasks[1]["annotations"] = [vote("left"), vote("right")]
    tasks[2]["annotations"] = [vote("no difference", "left")]
    tasks[3]["annotations"] = [{**vote("left"), "was_cancelled": True}]
    (tmp_path/"export.json").write_text(json.dumps(tasks))
    assert list(P.load_gold(tmp_path/"export.json").values()) == ["a", "tie", "tie"]
    (tmp_path/"odd.jsonl").write_text(json.dumps({**rows[0], "better": "left"})+"\n")
    with pytest.raises(P.PreferenceError, match="write a, b or tie"): P.load_gold(tmp_path/"odd.jsonl")

def test_one_encoding_for_chosen_and_rejected():
    model, processor = small()
    P.make_optimizers(model, P.dpo(lora_rank=4))
    groups, widths = [pairs(6)[0:2], pairs(6)[2:4]], []
    model.projector.register_forward_hook(lambda m, x, y: widths.append(len(x[0])))
    loss, f = P.preference_loss(model.train(), groups, look, processor, P.dpo())
    assert widths == [6, 6]                  # two clips of three groups: once for the policy, once for the reference, whatever the number of pairs
    loss.backward()
    assert not any(p.grad is not None for n, p in model.named_parameters() if ".lora_" not in n)
    assert abs(f["chosen"]-f["ref_chosen"]) < 1e-4

def test_text_beside_video_in_one_batch():
    model, processor = small()
    add_lora(model, r=4)
    mixed = [[p] for p in pairs(4)[::2]]+[[p] for p in pairs(2, with_video=False, seed=3)]
    for recipe in (P.dpo(), P.ipo(), P.kto()):
        loss, f = P.preference_loss(model.train(), mixed, look, processor, recipe)
        assert math.isfinite(float(loss)); loss.backward()
    alone = [P.preference_loss(model.eval(), [g], look, processor, P.dpo())[1]["chosen"] for g in mixed]
    assert abs(np.mean(alone)-f["chosen"]) < 1e-3

def test_what_cannot_be_trained_is_said(tmp_path):
    model, processor = small()
    with pytest.raises(P.PreferenceError, match="no pairs to train on"): P.pair_set([], look)
    with torch.no_grad(): model.language_model.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(P.TrainingError, match="not finite"): P.prefer(model, processor, P.pair_set(pairs(4), look), P.dpo(steps=20, clips=1, lora_rank=2), tmp_path/"nan", progress=False)

def test_an_adapter_that_is_there_becomes_the_reference(tmp_path):
    model, processor = small()
    add_lora(model, r=4)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".lora_B." in n: p.normal_(0, .2)
    data = P.pair_set(pairs(4), look)
    before = P.preference_loss(model.eval(), data.pairs, look, processor, P.dpo())[1]["chosen"]
    out = P.prefer(model, processor, data, P.dpo(steps=2, clips=2, lora_rank=4, save_every=50), tmp_path/"run", progress=False)
    first = json.loads((out/"log.jsonl").read_text().splitlines()[0])
    assert abs(first["ref_chosen"]-before) < 1e-3
    assert sorted(p.name for p in (out/"adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "projector.safetensors", "video_vlm.json"]
    again = load_model(out/"model", device="cpu")[0]
    a, b = (P.preference_loss(m, data.pairs, look, processor, P.dpo())[1]["chosen"] for m in (model.eval(), add_lora(again, r=2)))
    assert abs(a-b) < 1e-3                                                   # the merged model says what the adapted one said
    P.prefer(small()[0], processor, data, P.dpo(steps=2, clips=2, lora_rank=4, save_every=50), out, progress=False)     # done already: nothing is trained

RUN = """
import sys, json
sys.path.insert(0, {tests!r})
from test_preference import P, look, pairs, small
model, processor = small()
P.prefer(model, processor, P.pair_set(pairs(12), look), P.dpo(steps=12, clips=2, lora_rank=4, save_every=3), sys.argv[1], progress=False)
"""
@pytest.mark.slow
def test_killed_at_any_step_it_ends_the_same(tmp_path):
    cmd = [sys.executable, "-c", RUN.format(tests=str(Path(__file__).parent))]
    subprocess.run([*cmd, tmp_path/"through"], check=True)
    for n in (2, 8):
        p, log = subprocess.Popen([*cmd, tmp_path/"killed"]), tmp_path/"killed"/"log.jsonl"
        while p.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < n): time.sleep(.01)
        p.send_signal(signal.SIGKILL); p.wait()
    subprocess.run([*cmd, tmp_path/"killed"], check=True)
    rows = [[{k: v for k, v in json.loads(l).items() if k != "seconds"} for l in (tmp_path/d/"log.jsonl").read_text().splitlines()] for d in ("through", "killed")]
    assert rows[0] == rows[1] and len(rows[0]) == 12

TWO = """
import sys
sys.path.insert(0, {tests!r})
from test_preference import P, look, pairs, small
mixed = [p for a, b in zip(pairs(8)[::2], pairs(8, with_video=False, seed=5)) for p in (a, b)]      # a clip beside a text: one of each for the two ranks
P.prefer(*small(), P.pair_set(mixed, look), P.PreferenceRecipe(loss=sys.argv[2], steps=6, clips=2, lora_rank=4, lr=2e-3), sys.argv[1], progress=False)
"""
@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_two_processes_have_the_losses_of_one(loss, tmp_path):
    (tmp_path/"run.py").write_text(TWO.format(tests=str(Path(__file__).parent)))
    subprocess.run([sys.executable, tmp_path/"run.py", tmp_path/"one", loss], check=True, timeout=600)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path/"run.py", tmp_path/"two", loss], check=True, timeout=600)
    one, two = [[json.loads(l) for l in (tmp_path/d/"log.jsonl").read_text().splitlines()] for d in ("one", "two")]
    assert len(one) == len(two) == 6
    for k in ("loss", "chosen", "rejected", "margin", "z"): assert max(abs(a[k]-b[k]) for a, b in zip(one, two)) < 1e-3, k

# --- TRL -----------------------------------------------------------------------------------------------------------

def trl_losses(kind, model, processor, data, recipe, folder, sft=0.):
    "Losses of TRL's own trainer on the same text, adapter, optimiser and order."
    from datasets import Dataset
    from peft import get_peft_model
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    lm = get_peft_model(small()[0].language_model, LORA(recipe))            # the same first weights
    mine = {n.removeprefix("language_model."): p for n, p in model.named_parameters() if ".lora_" in n}
    with torch.no_grad():
        theirs = {n.removeprefix("base_model.model."): p for n, p in lm.named_parameters() if ".lora_" in n}
        assert set(theirs) == set(mine)
        for n, p in theirs.items(): p.copy_(mine[n])
    rows = [p for step in range(recipe.steps) for g in P.step_pairs(data, recipe, step) for p in g]
    ask = lambda q: f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n"
    opt = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=recipe.lr, betas=(.9, .98), weight_decay=recipe.weight_decay)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: P.rate(recipe, s))
    shared = dict(output_dir=str(folder), max_steps=recipe.steps, logging_steps=1, report_to=[], save_strategy="no", max_grad_norm=recipe.clip, beta=recipe.beta, use_cpu=True, bf16=False,
                  gradient_checkpointing=False, train_sampling_strategy="sequential", disable_tqdm=True, max_length=None)
    if kind == "kto":
        n = recipe.clips
        both = [(p.prompt, t, ok) for at in range(0, len(rows), n) for ok in (True, False) for p in rows[at:at+n] for t in [p.chosen if ok else p.rejected]]
        ds = Dataset.from_list([dict(prompt=ask(q), completion=t, label=ok) for q, t, ok in both])
        t = KTOTrainer(lm, args=KTOConfig(per_device_train_batch_size=2*n, **shared), train_dataset=ds, processing_class=processor.tokenizer, optimizers=(opt, sched))
    else:
        ds = Dataset.from_list([dict(prompt=ask(p.prompt), chosen=p.chosen, rejected=p.rejected) for p in rows])
        types, weights = ["sigmoid" if kind == "dpo" else kind], [1.]
        if sft: types, weights = types+["sft"], [1., sft]
        t = DPOTrainer(lm, args=DPOConfig(per_device_train_batch_size=recipe.clips, loss_type=types, loss_weights=weights, **shared), train_dataset=ds, processing_class=processor.tokenizer, optimizers=(opt, sched))
    t.train()
    return [r["loss"] for r in t.state.log_history if "loss" in r]

def LORA(recipe):
    from peft import LoraConfig
    return LoraConfig(r=recipe.lora_rank, lora_alpha=2*recipe.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")

@pytest.mark.parametrize("kind, sft", [("dpo", 0.), ("dpo", .5), ("ipo", 0.), ("kto", 0.)])
def test_losses_are_those_of_trl(kind, sft, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed: pip install -c constraints.txt trl")
    model, processor = small()
    recipe = P.PreferenceRecipe(name=kind, loss=kind, sft=sft, steps=8, clips=4, lora_rank=4, lr=2e-3, questions=1, save_every=100)
    data = P.pair_set(pairs(32, with_video=False), look)
    torch.manual_seed(recipe.seed)
    P.make_optimizers(model, recipe)                                        # the adapter that `prefer` would begin with
    theirs = trl_losses(kind, model, processor, data, recipe, tmp_path/"trl", sft)
    fresh, processor = small()
    out = P.prefer(fresh, processor, data, recipe, tmp_path/"ours", progress=False)
    ours = [json.loads(l)["loss"] for l in (out/"log.jsonl").read_text().splitlines()]
    assert len(ours) == len(theirs) == 8 and max(abs(a-b) for a, b in zip(ours, theirs)) < 1e-4, (ours, theirs)
    assert abs(ours[-1]-ours[0]) > 1e-2                                     # something was learnt on the way

def test_own_clips_are_judged_by_a_model_that_reads_the_constitution(tmp_path):
    "`say` knows the truth of each file and answers what a large model would be asked; one clip makes it fail, and a stopped run asks nothing twice."
    from video_vlm.data import ingest
    from video_vlm.world import WorldConfig, write_world
    world = write_world(tmp_path/"world", WorldConfig(n=4, size=96, seed=8, level="hard"), progress=False)
    truths = {Path(t["video"]).name: t for t in map(json.loads, (world/"truth.jsonl").read_text().splitlines())}
    ingest(world/"clips", tmp_path/"00_ingest")
    asked, (broken, *_) = [], sorted(truths)
    def say(video, text):
        asked.append((Path(video).name, text)); truth = truths[Path(video).name]
        if Path(video).name == broken: raise P.PreferenceError("the judge is away")
        if text.startswith("Question about the video") and "Write the new answer only" in text: return truth["captions"][0]
        if "Reply with A, B or tie" in text:
            wrong = [P.check_caption(text.split(f"Answer {s}: ")[1].split("\nAnswer B" if s == "A" else "\nWhich")[0], truth) for s in "AB"]
            score = [c["told"]-2*c["wrong"] for c in wrong]
            return "tie" if score[0] == score[1] else "AB"[score[1] > score[0]]
        return "yes, a thing that is not there" if "Does the answer name anything" in text else "no"
    model, processor = load_model(str(files("video_vlm")/"checkpoints"/"tiny"), device="cpu")
    with pytest.raises(P.PreferenceError, match="--judge"): P.prefer_files(model, processor, tmp_path/"00_ingest", tmp_path/"run", progress=False)
    out = P.prefer_files(model, processor, tmp_path/"00_ingest", tmp_path/"run", P.dpo(steps=1, clips=1, lora_rank=2), k=2, progress=False, say=say, by="model:big")
    pools, found = [json.loads(l) for l in open(out/"pools.jsonl")], P.load_pairs(out/"pairs.jsonl")
    assert [bool(p["error"]) for p in pools] == [Path(p["video"]).name == broken for p in pools] and any(p["revised"] for p in pools)
    assert found and all(p.by == "model:big" and P.check_caption(p.chosen, truths[Path(p.video).name])["wrong"] == 0 for p in found)
    before = len(asked); (out/"pairs.jsonl").unlink()
    P.draw_pairs(model, processor, [(p["video"], p["prompt"]) for p in pools], None, say, journal=out/"pools.jsonl")
    assert len(asked) == before
    with pytest.raises(P.PreferenceError, match="other clips"): P.draw_pairs(model, processor, [("else", "x")], None, say, journal=out/"pools.jsonl")
