"""Baselines: what they may look at, what they fall back to, and that they find a signal that is there."""
import numpy as np
import polars as pl
import pytest

from ehr_r1.config import Run
from ehr_r1.data.samples import SAMPLES, read_samples
from ehr_r1.data.events import DISPLAY
from ehr_r1.evaluation.baselines import SYSTEMS, best_cut, f1_at_k, fit_task, run_baselines
from ehr_r1.evaluation.benchmark import published, score_run
from ehr_r1.evaluation.features import (
    COUNTED,
    MEASURED_COLUMNS,
    WORDS_COUNTED,
    count_matrix,
    dense_features,
    learn_vocabulary,
    observations,
    unit_rows,
)
from ehr_r1.evaluation.predictions import predict_baselines, predict_ceiling, read_predictions
from ehr_r1.intervals import score_all
from ehr_r1.profiles import profile


def planted(patients=400, seed=0):
    "One risk and one decision task; lactate tells the risk, the complaint the drugs."
    rng = np.random.default_rng(seed)
    samples, facts = [], []
    for p in range(patients):
        for task in ('Inpatient_Mortality', 'prescriptions'):
            for j in range(2):
                key, sick, infected = f'{task}/{p}/{j}', rng.normal(), rng.random() < .4
                facts += [(key, 'patients', f'{30+p % 60}\x1fF'), (key, 'triage', '\x1f90'+'\x1f'*7+('fever' if infected else 'chest pain')),
                          (key, 'labevents', f'Lactate\x1f{2+sick:.1f}\x1fmmol/L\x1f\x1f\x1f\x1f')]
                facts += [(key, 'labevents', f'Other {rng.integers(20)}\x1f{rng.normal():.1f}\x1f\x1f\x1f\x1f\x1f') for _ in range(8)]
                label = (['Vancomycin', 'Cefepime'] if infected else ['Aspirin', 'Heparin']) if task == 'prescriptions' else ['yes' if rng.random() < 1/(1+np.exp(-2.5*sick)) else 'no']
                samples.append((key, p, task, 'decision' if task == 'prescriptions' else 'risk', 'train' if p % 10 < 7 else 'tuning' if p % 10 == 7 else 'held_out', label))
    return (pl.DataFrame(samples, schema=['sample_id', 'subject_id', 'task', 'family', 'split', 'label'], orient='row'),
            pl.DataFrame(facts, schema=['sample_id', 'table', 'cells'], orient='row').with_columns(time=pl.lit(None, pl.Datetime('us'))))

@pytest.fixture(scope='module')
def data(): return planted()

@pytest.fixture(scope='module')
def made(data): return run_baselines(*data, seed=1, workers=1, progress=False)

def same(a, b): return all(a[s].sort('task', 'sample_id').equals(b[s].sort('task', 'sample_id')) for s in SYSTEMS)

def test_models_find_the_planted_signal(data, made):
    held = data[0].filter(pl.col('split') == 'held_out')
    t = score_all(held, made, replicates=20)
    value = {(r['system'], r['metric']): r['value'] for r in t.filter(pl.col('task') == 'overall').iter_rows(named=True)}
    assert value['majority', 'auroc'] == value['frequency', 'auroc'] == .5
    assert value['logistic', 'auroc'] > .75 and value['boosting', 'auroc'] > .75
    assert value['frequency', 'f1'] >= value['majority', 'f1']
    assert value['logistic', 'f1'] > value['frequency', 'f1']+.2
    assert all(f['fallback'].null_count() == f.height for f in made.values())
    assert {s: f.height for s, f in made.items()} == dict(majority=320, frequency=320, logistic=320, boosting=160)

def test_held_out_labels_change_nothing(data, made):
    samples, facts = data
    other = samples.with_columns(label=pl.when(pl.col('split') != 'held_out').then('label').when(pl.col('family') == 'risk').then(pl.lit(['yes'])).otherwise(pl.lit(['Zebra'])))
    assert not other.equals(samples) and same(made, run_baselines(other, facts, seed=1, workers=1, progress=False))

def test_held_out_facts_change_no_other_prediction(data, made):
    "Codes, cuts and models come from training patients: rewriting one held-out patient leaves the others' answers alone."
    samples, facts = data
    one = samples.filter(pl.col('split') == 'held_out')['sample_id'][0]
    changed = facts.with_columns(cells=pl.when((pl.col('sample_id') == one) & (pl.col('table') == 'labevents')).then(pl.lit('Lactate\x1f99\x1f\x1f\x1f\x1f\x1f')).otherwise('cells'))
    again = run_baselines(samples, changed, seed=1, workers=1, progress=False)
    rest = lambda m: {s: f.filter(pl.col('sample_id') != one) for s, f in m.items()}
    assert same(rest(made), rest(again)) and not same(made, again)

def test_order_workers_and_repetition_change_nothing(data, made):
    samples, facts = data
    shuffled = samples.sample(fraction=1, shuffle=True, seed=3)
    assert same(made, run_baselines(shuffled, facts, seed=1, workers=2, progress=False))

def test_facts_may_be_a_function_that_never_sees_labels(data, made):
    samples, facts = data
    def ask(part):
        assert 'label' not in part.columns and part['task'].n_unique() == 1
        return facts.join(part.select('sample_id'), on='sample_id', how='semi', maintain_order='left')
    assert same(made, run_baselines(samples, ask, seed=1, workers=1, progress=False))

def test_few_samples_fall_back_and_say_so(data):
    samples, facts = data
    made = run_baselines(samples.filter(pl.col('subject_id') < 20), facts, workers=1, progress=False)
    logistic, frequency = made['logistic'], made['frequency']
    assert logistic['answer'].equals(frequency['answer']) and logistic['risk'].equals(frequency['risk'])
    assert set(logistic['fallback']) == {'28 training samples'} and set(made['boosting']['fallback']) == {'28 training samples'}

def test_tasks_without_training_samples_or_with_one_class(data):
    samples, facts = data
    made = run_baselines(samples.filter(pl.col('split') == 'held_out'), facts, workers=1, progress=False)
    assert set(made['frequency']['fallback']) == {'no training samples'} and made['majority']['risk'].drop_nulls().unique().to_list() == [.5]
    assert made['logistic'].filter(pl.col('task') == 'prescriptions')['answer'].list.len().max() == 0
    never = samples.filter(pl.col('family') == 'risk').with_columns(label=pl.when(pl.col('split') == 'held_out').then('label').otherwise(pl.lit(['no'])))
    made = fit_task(never, facts)
    assert made['boosting']['risk'].unique().to_list() == [0] and made['boosting']['fallback'][0] == '0 training samples of one class'

def test_without_tuning_or_held_out_patients(data):
    samples, facts = data
    made = run_baselines(samples.filter(pl.col('split') != 'tuning'), facts, workers=1, progress=False)
    assert made['logistic']['fallback'].null_count() == made['logistic'].height
    assert {f.height for f in run_baselines(samples.filter(pl.col('split') != 'held_out'), facts, workers=1, progress=False).values()} == {0}

def test_a_patient_in_two_splits_is_refused(data):
    samples, facts = data
    with pytest.raises(ValueError, match='two splits'):
        fit_task(samples.filter(pl.col('family') == 'risk').with_columns(subject_id=pl.lit(1)), facts)

# ---- what is counted

def frame(rows): return pl.DataFrame(rows, schema=['sample_id', 'table', 'cells'], orient='row').with_columns(time=pl.lit(None, pl.Datetime('us')))

def test_observations_by_hand():
    seen = observations(frame([('s', 'labevents', 'Lactate\x1f4.1\x1fmmol/L\x1f\x1f\x1fabnormal\x1f'), ('s', 'medrecon', 'Aspirin\x1fA\x1eB'), ('s', 'medrecon', '\x1f'),
                               ('s', 'omr', 'Blood Pressure\x1f110/65'), ('s', 'labevents', 'Culture\x1fpositive\x1f\x1f\x1f\x1f\x1f'), ('s', 'icustays', ''),
                               ('s', 'triage', '\x1f\x1f\x1f\x1f\x1f\x1funable\x1f2.0\x1fAbd pain, N/V')]))
    got = sorted((c, v) for c, v in seen.select(pl.col('code').cast(pl.String), 'value').iter_rows() if not c.startswith('rows'))
    assert got == [('labevents:flag=abnormal', None), ('labevents:item_name=Culture', None), ('labevents:item_name=Lactate', None), ('labevents:valuenum=Lactate', 4.1),
                   ('medrecon:ATC Type=A', None), ('medrecon:ATC Type=B', None), ('medrecon:name=Aspirin', None), ('omr:result_name=Blood Pressure', None),
                   ('omr:result_value=Blood Pressure', 110.), ('triage:acuity', 2.), ('triage:word=abd', None), ('triage:word=n', None), ('triage:word=pain', None), ('triage:word=v', None)]
    assert seen.filter(pl.col('code').cast(pl.String) == 'rows:medrecon').height == 2

def test_columns_and_cuts_come_from_training_samples():
    ids = [f's{i:02d}' for i in range(40)]
    seen = observations(frame([(s, 'labevents', f'Lactate\x1f{i}\x1f\x1f\x1f\x1f\x1f') for i, s in enumerate(ids)]+[('s39', 'labevents', 'Rare\x1f1\x1f\x1f\x1f\x1f\x1f')]))
    v = learn_vocabulary(seen.filter(pl.col('sample_id').cast(pl.String) < 's30'))
    assert v.cuts['cut'].sort().to_list() == [3, 6, 9, 12, 15, 18, 21, 24, 27]
    x = count_matrix(seen, ids, v).toarray()
    names = [f'{c}~{b}' for c, b in v.columns.iter_rows()]
    assert not any('Rare' in n for n in names)
    assert x[:, names.index('rows:labevents~-1')].tolist() == [1.]*39+[2.]
    assert x.shape == (40, v.columns.height) and np.allclose(np.linalg.norm(unit_rows(count_matrix(seen, ids, v)).toarray(), axis=1), 1)

def test_latest_value_wins():
    rows = [(f's{i}', 'labevents', f'Lactate\x1f{v}\x1f\x1f\x1f\x1f\x1f') for i in range(6) for v in (1, 5+i)]
    seen = observations(frame(rows))
    ids = [f's{i}' for i in range(7)]
    x = dense_features(seen, ids, count_matrix(seen, ids, learn_vocabulary(seen)), np.ones(7, bool))
    assert x[:6, -1].tolist() == [5, 6, 7, 8, 9, 10] and np.isnan(x[6, -1])

def test_every_counted_table_names_its_columns():
    assert all(columns for columns in COUNTED.values()) and set(WORDS_COUNTED) <= set(MEASURED_COLUMNS)
    for table in {*COUNTED, *MEASURED_COLUMNS}:
        asked = {*COUNTED.get(table, []), *(c for pair in MEASURED_COLUMNS.get(table, []) for c in pair if c)}
        assert asked <= set(DISPLAY[table].columns), table

def test_cuts_by_hand():
    assert np.allclose(f1_at_k(np.array([[0, 1], [1, 0]]), np.array([1, 2])), [[0, 2/3], [2/3, 2/4]])
    cut = best_cut(np.array([[.9, .8, .1], [.9, .3, .1]]), np.array([[1, 1, 0], [1, 0, 0]]), np.array([2, 1]))
    assert [len(cut.answer(row, ['a', 'b', 'c'])) for row in np.array([[.9, .8, .1], [.9, .2, .1], [.1, .02, .01]])] == [2, 1, 1]
    assert best_cut(np.tile([.5, .5, .5], (4, 1)), np.tile([1, 1, 0], (4, 1)), np.full(4, 2)).k == 2

# ---- files

def test_a_run_from_samples_to_scores(data, tmp_path):
    samples, facts = data
    run = Run('x', tmp_path)
    samples = samples.with_columns(hadm_id=pl.int_range(pl.len()))
    samples = samples.with_columns(pl.lit(None, t).alias(c) for c, t in SAMPLES.items() if c not in samples.columns).select(list(SAMPLES))
    for name, part in (('ehr_ins', pl.col('split') != 'held_out'), ('ehr_bench', pl.col('split') == 'held_out')):
        (run.samples/name).mkdir(parents=True)
        samples.filter(part).write_parquet(run.samples/name/'shard-00000.parquet')
    read = read_samples(run, profile('smoke'))
    assert read.height == samples.height and not {'messages', 'candidates'} & set(read.columns)
    held = read.filter(pl.col('split') == 'held_out')
    truth = held.filter(pl.col('family') == 'risk').select('task', 'subject_id', 'hadm_id', 'stay_id', risk=(pl.col('label').list.first() == 'yes').cast(pl.Float64))
    predict_baselines(read, facts, tmp_path/'predictions', truth, workers=1, progress=False)
    first = {p.name: p.read_bytes() for p in (tmp_path/'predictions').iterdir()}
    assert set(first) == {f'{s}.parquet' for s in (*SYSTEMS, 'ceiling')}
    predict_baselines(read, facts, tmp_path/'predictions', truth, workers=1, progress=False)
    assert first == {p.name: p.read_bytes() for p in (tmp_path/'predictions').iterdir()}
    score_run(held, read_predictions(tmp_path/'predictions'), tmp_path/'scores', replicates=20)
    scores = pl.read_csv(tmp_path/'scores'/'scores.csv')
    assert scores.filter((pl.col('system') == 'ceiling') & (pl.col('task') == 'overall') & (pl.col('metric') == 'auroc'))['value'].item() == 1
    assert scores.height == pl.read_parquet(tmp_path/'scores'/'scores.parquet').height
    assert {p.name for p in (tmp_path/'scores').iterdir()} == {f'{n}.{e}' for n in ('scores', 'comparisons', 'calibration') for e in ('csv', 'parquet')}

def test_ceiling_matches_stays_and_admissions():
    samples = pl.DataFrame(dict(sample_id=['a', 'b', 'c'], subject_id=[1, 1, 2], task=['ICU_Mortality_1day', 'Readmission_30day', 'Readmission_30day'], family=['risk']*3,
                                hadm_id=[7, 7, 8], stay_id=[5, None, None]))
    truth = pl.DataFrame(dict(task=['ICU_Mortality_1day', 'ICU_Mortality_1day', 'Readmission_30day', 'ED_Hospitalization'], subject_id=[1, 1, 1, 1], hadm_id=[7, 7, 7, None], stay_id=[5, 6, None, 5], risk=[.1, .2, .3, .4]))
    made = predict_ceiling(samples, truth)
    assert dict(zip(made['sample_id'], made['risk'])) == dict(a=.1, b=.3, c=None) and made.filter(pl.col('sample_id') == 'c')['fallback'].item() == 'not in truth'
    with pytest.raises(ValueError, match='more than once'): predict_ceiling(samples, pl.concat([truth, truth]))

def test_published_results_are_readable():
    t = published()
    row = t.filter((pl.col('system') == 'EHR-R1-72B') & (pl.col('metric') == 'F1')).row(0, named=True)
    assert row['value'] == .6744 and row['half_width_95'] == .016 and t['value'].null_count() == 0
