"Simulations with other seeds than the notebook's: the statistics keep what they promise."
import json, multiprocessing as mp
import numpy as np, pytest
from video_vlm import experiments as E
from video_vlm.bench.decisions import off_policy_world

AB = E.Experiment("ab", {"a": .5, "b": .5})

def test_daily_looks_at_most_five_percent_false_alarms():
    for seed, per_day in ((1, 20), (2, 100), (3, 1000)):
        always, fixed = E.simulate_looks(1500, 28, per_day, seed=seed)
        assert always <= .05 < fixed

def test_cuped_variance_ratio_within_ten_percent_of_theory_and_unbiased():
    rng, diffs = np.random.default_rng(1), []
    for rho in (.2, .5, .8, .95):
        n = 20000; arm = rng.integers(0, 2, n); x = rng.exponential(size=n); y = .2*arm + rho*(x-1) + np.sqrt(1-rho**2)*rng.normal(size=n)
        adj, ratio = E.cuped(y, x, arm); assert abs(ratio/(1-rho**2)-1) < .1
        d, se, *_ = E.welch(adj, arm); assert abs(d-.2) < 4*se
    assert E.cuped(y, np.ones(n), arm)[1] == 1.

def test_srm_power_and_level():
    rng = np.random.default_rng(2)
    assert np.mean([E.srm(c, [.5, .5]) < .001 for c in rng.multinomial(10000, [.53, .47], 400)]) > .95
    assert np.mean([E.srm(c, [.9, .1]) < .001 for c in rng.multinomial(10000, [.9, .1], 4000)]) < .004

@pytest.mark.parametrize("kind", ["mean", "ratio", "cuped", "clustered"])
def test_coverage(kind):
    reps = 500
    assert .92 <= E.simulate_coverage(kind, reps=reps, seed=21) <= .98

@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mean", "ratio", "cuped", "clustered"])
def test_coverage_with_many_experiments(kind): assert .93 <= E.simulate_coverage(kind, reps=4000, seed=12) <= .97

def test_aa_with_many_metrics_is_corrected():
    rng, wins, n = np.random.default_rng(4), 0, 150
    ms = [E.Metric(f"m{i}") for i in range(8)]
    for _ in range(n):
        d = {"variant": np.where(rng.random(600) < .5, "a", "b"), **{m.name: rng.normal(size=600) for m in ms}}
        wins += any(e.verdict != "unclear" for e in E.analyse(AB, d, ms).effects)
    assert wins <= 14

@pytest.mark.slow
def test_aa_sequential_many_metrics_and_looks():
    rng, wins, n = np.random.default_rng(5), 0, 40
    ms, cfg = [E.Metric(f"m{i}") for i in range(3)], E.AnalysisConfig(planned=1000)
    for _ in range(n):
        v = np.where(rng.random(1000) < .5, "a", "b"); d = {m.name: rng.normal(size=1000) for m in ms}
        wins += any(e.verdict != "unclear" for k in range(100, 1001, 100) for e in E.analyse(AB, {"variant": v[:k], **{m: x[:k] for m, x in d.items()}}, ms, cfg).effects)
    assert wins <= 6

def world(n, seed, share=.3): return off_policy_world(n, seed, share)

def test_off_policy_is_unbiased_and_covers():
    est, hits, err = 150, np.zeros(3), np.zeros(3)
    for s in range(est):
        x, a, r, p, t, pol, truth = world(2000, 5000+s); q = E.fit_rewards(x, a, r, pol, folds=2)
        for k, e in enumerate((E.ips(r, t, p), E.snips(r, t, p), E.doubly_robust(r, t, p, *q))): hits[k] += e.lo <= truth <= e.hi; err[k] += e.value-truth
    assert (hits/est >= .9).all() and (np.abs(err/est) < .008).all()

@pytest.mark.slow
@pytest.mark.parametrize("share", [.1, .3])
def test_off_policy_coverage_with_little_exploration(share):
    "Against the mean over the population, 1,000 logs: 93-97% (less two standard errors of the simulation)."
    truth = np.mean([world(20000, 10**6+s, share)[6] for s in range(40)]); hits = np.zeros(3)
    for s in range(1000):
        x, a, r, p, t, pol, _ = world(2000, 40000+s, share); q = E.fit_rewards(x, a, r, pol, folds=2)
        for k, e in enumerate((E.ips(r, t, p), E.snips(r, t, p), E.doubly_robust(r, t, p, *q))): hits[k] += e.lo <= truth <= e.hi
    assert (hits/1000 >= .93-2*.008).all() and (hits/1000 <= .97+2*.006).all(), hits/1000

def test_the_skewed_interval_is_the_normal_one_without_skew_and_better_with_it():
    rng = np.random.default_rng(0); v = np.r_[np.linspace(-1, 1, 401)]; lo, hi = E.skewed_interval(v); half = 1.96*v.std(ddof=1)/np.sqrt(401)
    assert abs(lo+half) < 1e-6 and abs(hi-half) < 1e-6
    x = rng.exponential(size=(4000, 60))**1.5; truth = 1.3293403881791368                    # mean of Exp(1)^1.5
    plain = np.mean([abs(v.mean()-truth) <= 1.96*v.std(ddof=1)/np.sqrt(60) for v in x]); hall = np.mean([lo <= truth <= hi for lo, hi in map(E.skewed_interval, x)])
    assert hall > plain+.01

def test_metrics_are_read_from_words():
    m = E.parse_metric("errors/requests:lower:guard=0.005:before=old"); assert (m.name, m.denominator, m.higher_is_better, m.guardrail, m.margin, m.covariate) == ("errors", "requests", False, True, .005, "old")
    for bad in ("", "a:less", "a:guard=x", ":lower"):
        with pytest.raises(E.ExperimentError): E.parse_metric(bad)

def test_doubly_robust_survives_a_wrong_reward_model():
    x, a, r, p, t, pol, truth = world(20000, 1)
    e = E.doubly_robust(r, t, p, np.full(len(r), .9), np.full(len(r), .9)); assert e.lo-.01 <= truth <= e.hi+.01

def test_no_overlap_is_refused():
    x, a, r, p, t, *_ = world(3000, 2, share=.002)
    for f in (E.ips, E.snips):
        with pytest.raises(E.ExperimentError): f(r, t, p)
    with pytest.raises(E.ExperimentError, match="propensities"): E.ips([1.], [1.], [0.])

def test_calibration_improves_and_the_alarm_is_quiet_then_loud():
    rng = np.random.default_rng(6)
    def window(n, shift=0.): z = rng.normal(.5, 1.5, n); return 1/(1+np.exp(-2.5*z)), rng.random(n) < 1/(1+np.exp(-z-shift))
    for n, m in ((200, "platt"), (4000, "isotonic")):
        cal, (c, y) = E.fit_calibrator(*window(n)), window(6000); assert cal.method == m and E.ece(cal(c), y) < .6*E.ece(c, y)
    assert sum(E.calibration_drift(cal(c), y)["alarm"] for c, y in (window(800) for _ in range(100))) == 0
    c, y = window(2000, -1.); assert E.calibration_drift(cal(c), y)["alarm"]
    with pytest.raises(E.ExperimentError): E.fit_calibrator([.5]*10, [1]*10)

def test_layers_are_exclusive_and_independent():
    a, b, c = (E.Experiment(n, {"x": .5, "y": .5}, layer=l, slots=s) for n, l, s in (("a", "1", (0, 500)), ("b", "1", (500, 1000)), ("c", "2", (0, 1000))))
    ex, keys = E.Experiments([a, b, c], holdout=.05), [f"k{i}" for i in range(20000)]
    got = {n: {k: r.variant for k in keys if (r := ex.assign(n, k))} for n in "abc"}
    assert not got["a"].keys() & got["b"].keys() and abs(len(got["c"])/len(keys)-.95) < .01
    both = got["a"].keys() & got["c"].keys(); table = np.zeros((2, 2))
    for k in both: table[got["a"][k] == "y", got["c"][k] == "y"] += 1
    from scipy.stats import chi2_contingency
    assert chi2_contingency(table).pvalue > .001
    with pytest.raises(E.ExperimentError): E.Experiments([a, E.Experiment("z", {"x": .5, "y": .5}, layer="1", slots=(499, 600))])

def _write(path, i):
    log = E.ExposureLog(path)
    for k in range(300): log.log(E.Assignment("e", "v", .5), f"p{i}-{k}", note="x"*500)

def test_writers_do_not_tear_each_others_lines(tmp_path):
    ps = [mp.get_context("fork").Process(target=_write, args=(tmp_path/"l", i)) for i in range(3)]
    for p in ps: p.start()
    for p in ps: p.join(); assert p.exitcode == 0
    assert len({json.loads(l)["key"] for l in (tmp_path/"l").read_text().splitlines()}) == 900

def test_a_key_in_two_variants_is_left_out():
    rows = [dict(time=i, key=k, tenant="", experiment="e", variant=v, propensity=.5) for i, (k, v) in enumerate((("a", "x"), ("b", "y"), ("a", "y")))]
    first, mixed = E.first_exposures(rows, "e"); assert set(first) == {"b"} and mixed == {"a"}

def test_against_gbstats():
    "GrowthBook's figures for Welch and the sequential interval; its package is put in by hand (pip install --no-deps gbstats)."
    pytest.importorskip("gbstats")
    from gbstats.frequentist.tests import SequentialConfig, SequentialTwoSidedTTest, FrequentistConfig, TwoSidedTTest
    from gbstats.models.statistics import SampleMeanStatistic
    rng = np.random.default_rng(0); a, b = rng.exponential(1, 900), rng.exponential(1.2, 1100)
    stat = lambda x: SampleMeanStatistic(n=len(x), sum=float(x.sum()), sum_squares=float((x**2).sum()))
    arm = np.r_[np.zeros(900), np.ones(1100)].astype(int); d, se, df, p = E.welch(np.r_[a, b], arm)
    g = TwoSidedTTest(stat(a), stat(b), FrequentistConfig(difference_type="absolute")).compute_result()
    assert abs(g.p_value-p) < 1e-6 and abs(g.expected-d) < 1e-9
    s = SequentialTwoSidedTTest(stat(a), stat(b), SequentialConfig(difference_type="absolute", sequential_tuning_parameter=2000)).compute_result()
    lo, hi, _ = E.always_valid(d, se, 2000, 2000)
    assert abs((s.ci[1]-s.ci[0])/(hi-lo)-1) < .1

def test_off_policy_interval_counts_users_not_requests():
    "Users who differ, ten requests each or forty: the interval by user holds the truth, the one by request does not."
    hit, users = np.zeros(2), 120
    for seed in range(300):
        rng = np.random.default_rng(seed); rate = rng.beta(.4, .4, users); unit = np.repeat(np.arange(users), rng.choice([10, 40], users)); tuned = rng.random(len(unit)) < .5
        for k, u in enumerate((unit, None)): e = E.snips(rng.random(len(unit)) < rate[unit], tuned.astype(float), np.full(len(unit), .5), unit=u); hit[k] += e.lo <= .5 <= e.hi
    assert .91 <= hit[0]/300 <= .985 and hit[1]/300 < .8, hit/300

def test_a_log_that_missed_a_few_heavy_rows_is_not_refused():
    "Weights of 19 that are rarer than expected by bad luck (mean .74): no support is missing. Where it is, that is said."
    x, a, r, p, t, *_ = world(2000, 40112, share=.1); assert (t/p).mean() < .75 and E.policy_weights(t, p)[1] > 100
    with pytest.raises(E.ExperimentError, match="weights average"): E.policy_weights(np.where(np.arange(2000) % 3, 1., 0.), np.ones(2000))
