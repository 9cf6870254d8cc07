"lmms-eval, the harness that papers use, runs our model on a task of two real clips, and gets the score that our own evaluation gives."
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install --no-deps -r requirements-nodeps.txt")

SCRIPT = """
import json, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from video_vlm.benchmarks import lmms_model
from video_vlm.evaluation import open_answer; from video_vlm.pretrain import checkpoint_folder
out = simple_evaluate(model=lmms_model(open_answer(str(checkpoint_folder()))[0]), tasks=["two_items"], task_manager=TaskManager(include_path=sys.argv[1], include_defaults=False), batch_size=1, bootstrap_iters=0, force_simple=True, log_samples=True)
print("RESULT" + json.dumps({"results": out["results"]["two_items"], "said": {s["doc_id"]: s["filtered_resps"] for s in out["samples"]["two_items"]}}, default=str))
"""


@pytest.mark.slow
def test_lmms_eval_runs_our_model(tmp_path):
    from video_vlm.evaluation import open_answer, run_task, task_from_samples
    from video_vlm.pretrain import checkpoint_folder
    from video_vlm.world import WorldConfig, samples_of, scene_of, write_world
    cfg = WorldConfig(n=2, level="easy", seed=31)
    write_world(tmp_path / "world", cfg)
    clips = sorted((tmp_path / "world" / "clips").glob("*.mp4"))
    asked = [next(s for s in samples_of(scene_of(cfg, k), c) if s.meta["kind"] == kind) for k, (c, kind) in enumerate(zip(clips, ("colour", "count")))]
    rows = [{"video": str(c), "question": s.messages[0]["content"][1]["text"], "answer": s.meta["answer"]} for c, s in zip(clips, asked)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "utils.py").write_text(textwrap.dedent("""
        def visual(doc): return [doc["video"]]
        def text(doc, kwargs=None): return doc["question"]
        def process(doc, results): return {"acc": float(results[0].strip().lower() == doc["answer"])}
        def mean(results): return sum(results) / len(results)
    """))
    (tmp_path / "two_items.yaml").write_text(textwrap.dedent(f"""
        task: two_items
        dataset_path: json
        dataset_kwargs:
          data_files:
            test: {tmp_path / 'data.json'}
        test_split: test
        output_type: generate_until
        doc_to_visual: !function utils.visual
        doc_to_text: !function utils.text
        doc_to_target: answer
        process_results: !function utils.process
        metric_list:
          - metric: acc
            aggregation: !function utils.mean
            higher_is_better: true
        generation_kwargs:
          until: ["\\n"]
          max_new_tokens: 8
    """))
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, env=env)
    line = next((l for l in run.stdout.splitlines() if l.startswith("RESULT")), None)
    assert line, run.stderr[-3000:]
    out = json.loads(line[6:])
    task = task_from_samples(asked)
    assert [i.media for i in task.items] == [str(c) for c in clips]
    ours = run_task(replace(task, prompt=lambda item: item.question), open_answer(str(checkpoint_folder()))[0])
    said = {str(k): (v[0] if isinstance(v, list) else v) for k, v in out["said"].items()}
    assert [said[str(k)] for k in range(2)] == [p.answer.strip() for p in ours.predictions]
    assert next(v for k, v in out["results"].items() if k.startswith("acc") and "stderr" not in k) == sum(a.lower() == r["answer"] for a, r in zip(said.values(), rows)) / 2


def test_requests_that_need_likelihoods_are_refused():
    from video_vlm.benchmarks import lmms_model
    from video_vlm.data import VideoVLMError
    with pytest.raises(VideoVLMError, match="likelihoods"): lmms_model(lambda i, p: "A").loglikelihood([])
