"lmms-eval runs our model on a two-item local task. Needs lmms-eval: `pip install --no-deps lmms-eval==0.7.3 pytz tenacity` (it is not among this package's own requirements)."
import json
import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install --no-deps lmms-eval==0.7.3 pytz tenacity")

SCRIPT = """
import json, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from video_vlm.benchmarks import lmms_model
asked = []
def answer(item, prompt):
    asked.append((item.media, prompt))
    return "B" if "vanish" in prompt else "The answer is A"
out = simple_evaluate(model=lmms_model(answer), tasks=["two_items"], task_manager=TaskManager(include_path=sys.argv[1], include_defaults=False), batch_size=1, bootstrap_iters=0, force_simple=True)
print("RESULT" + json.dumps({"results": out["results"]["two_items"], "asked": asked}, default=str))
"""


@pytest.mark.slow
def test_lmms_eval_runs_our_model(tmp_path):
    rows = [{"video": str(tmp_path / "a.mp4"), "question": "Does it vanish?\nA. no\nB. yes", "answer": "B"}, {"video": str(tmp_path / "b.mp4"), "question": "What grows?\nA. it\nB. none", "answer": "B"}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "utils.py").write_text(textwrap.dedent("""
        def visual(doc): return [doc["video"]]
        def text(doc, kwargs=None): return doc["question"]
        def process(doc, results): return {"acc": float(results[0].strip()[-1:] == doc["answer"])}
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
    assert [k for k in out["results"] if k.startswith("acc")] and next(v for k, v in out["results"].items() if k.startswith("acc") and "stderr" not in k) == .5
    assert sorted(m for m, _ in out["asked"]) == sorted(r["video"] for r in rows)


def test_requests_that_need_likelihoods_are_refused():
    from video_vlm.benchmarks import lmms_model
    from video_vlm.data import VideoVLMError
    with pytest.raises(VideoVLMError, match="likelihoods"): lmms_model(lambda i, p: "A").loglikelihood([])
