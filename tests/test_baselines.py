"""Baselines: what they may look at, what they fall back to, and that they find a signal that is there."""
from datetime import datetime

import numpy as np
import polars as pl
import pytest

from ehr_r1.config import Run
from ehr_r1.data.events import DISPLAY
from ehr_r1.data.samples import SAMPLES, read_samples
from ehr_r1.data.serialize import record_text
from ehr_r1.data.tasks import TASKS
from ehr_r1.evaluation.baselines import SYSTEMS, best_cut, f1_at_k, fit_task, run_baselines
from ehr_r1.evaluation.benchmark import score_run
from ehr_r1.evaluation.features import (
    COUNTED,
    MEASURED_COLUMNS,
    WORDS_COUNTED,
    count_matrix,
    dense_features,
    learn_vocabulary,
    line_matrix,
    observations,
    of_last_hours,
    unit_rows,
)
from ehr_r1.evaluation.predictions import given_lines, predict_baselines, predict_ceiling, read_predictions
from ehr_r1.evaluation.published import published
from ehr_r1.intervals import score_all
from ehr_r1.profiles import profile
from ehr_r1.training.examples import Prompter
from ehr_r1.training.models import train_tokenizer

PLANTED = ['sample_id', 'subject_id', 'task', 'family', 'split', 'label']
FACTS = ['sample_id', 'table', 'cells']
HELD_OUT = pl.col('split') == 'held_out'
RISK = pl.col('family') == 'risk'


def frame(rows):
    "Facts of no known time."
    no_time = pl.lit(None, pl.Datetime('us'))
    return pl.DataFrame(rows, schema=FACTS, orient='row').with_columns(time=no_time)


def lab(name, value='', unit='', flag=''):
    "The cells of a laboratory result."
    return '\x1f'.join([name, str(value), unit, '', '', flag, ''])


def split_of_patient(patient):
    digit = patient % 10
    if digit < 7:
        return 'train'
    return 'tuning' if digit == 7 else 'held_out'


def planted_facts(key, patient, sick, infected, rng):
    "What the record of one sample holds: lactate and complaint tell something, the other results nothing."
    complaint = 'fever' if infected else 'chest pain'
    yield key, 'patients', f'{30 + patient % 60}\x1fF'
    yield key, 'triage', '\x1f90' + '\x1f'*7 + complaint
    yield key, 'labevents', lab('Lactate', f'{2 + sick:.1f}', 'mmol/L')
    for _ in range(8):
        yield key, 'labevents', lab(f'Other {rng.integers(20)}', f'{rng.normal():.1f}')


def planted_label(task, sick, infected, rng):
    if task == 'prescriptions':
        return ['Vancomycin', 'Cefepime'] if infected else ['Aspirin', 'Heparin']
    dies = rng.random() < 1/(1 + np.exp(-2.5*sick))
    return ['yes' if dies else 'no']


def planted(patients=400, seed=0):
    "One risk and one decision task; lactate tells the risk, the complaint the drugs."
    rng = np.random.default_rng(seed)
    families = dict(Inpatient_Mortality='risk', prescriptions='decision')
    asked = [(p, task, j) for p in range(patients) for task in families for j in range(2)]
    samples, facts = [], []
    for patient, task, j in asked:
        key = f'{task}/{patient}/{j}'
        sick = rng.normal()
        infected = rng.random() < .4
        facts += planted_facts(key, patient, sick, infected, rng)
        label = planted_label(task, sick, infected, rng)
        split = split_of_patient(patient)
        samples.append((key, patient, task, families[task], split, label))
    return pl.DataFrame(samples, schema=PLANTED, orient='row'), frame(facts)


@pytest.fixture(scope='module')
def data():
    return planted()


def as_lines(facts):
    "Facts as a language model might be given them: the cells of a row a line."
    return facts.group_by('sample_id', maintain_order=True).agg(lines='cells')


def baselines(samples, facts, seed=1, workers=1):
    "The baselines without a bar."
    lines = (lambda part: as_lines(facts(part))) if callable(facts) else as_lines(facts)
    return run_baselines(samples, facts, seed=seed, workers=workers, progress=False, lines=lines)


@pytest.fixture(scope='module')
def made(data):
    return baselines(*data)


def in_order(predictions):
    return predictions.sort('task', 'sample_id')


def same(a, b):
    return all(in_order(a[system]).equals(in_order(b[system])) for system in SYSTEMS)


# ---- what is found

@pytest.fixture(scope='module')
def overall(data, made):
    "(system, metric) -> score over all tasks."
    held_out = data[0].filter(HELD_OUT)
    scores = score_all(held_out, made, replicates=20)
    rows = scores.filter(pl.col('task') == 'overall').iter_rows(named=True)
    return {(row['system'], row['metric']): row['value'] for row in rows}


def test_models_find_the_planted_risk(overall):
    assert overall['logistic', 'auroc'] > .75
    assert overall['boosting', 'auroc'] > .75


def test_systems_that_read_nothing_tell_no_risk(overall):
    assert overall['majority', 'auroc'] == .5
    assert overall['frequency', 'auroc'] == .5


def test_models_find_the_planted_drugs(overall):
    assert overall['frequency', 'f1'] >= overall['majority', 'f1']
    assert overall['logistic', 'f1'] > overall['frequency', 'f1'] + .2


def test_every_held_out_sample_is_answered_without_fallback(made):
    for predictions in made.values():
        assert predictions['fallback'].null_count() == predictions.height
    heights = {system: predictions.height for system, predictions in made.items()}
    assert heights == dict(majority=320, frequency=320, logistic=320, logistic_seen=320, boosting=160)


def test_lines_of_a_text_tell_the_planted_answers(overall):
    assert overall['logistic_seen', 'auroc'] > .65
    assert overall['logistic_seen', 'f1'] > overall['frequency', 'f1'] + .2


def test_without_texts_no_system_says_what_a_model_saw(data):
    made = run_baselines(*data, progress=False, workers=1)
    assert set(made) == set(SYSTEMS) - {'logistic_seen'}


def test_rows_that_no_text_shows_tell_logistic_seen_nothing(data):
    samples, facts = data
    shown = as_lines(facts.filter(pl.col('table') == 'patients'))
    blind = run_baselines(samples.filter(RISK), facts, progress=False, workers=1, lines=shown)
    scores = score_all(samples.filter(RISK & HELD_OUT), blind, replicates=20).filter(task='overall', metric='auroc')
    value = dict(scores.select('system', 'value').rows())
    assert value['logistic_seen'] < .6 < .75 < value['logistic']


# ---- what is looked at

def test_held_out_labels_change_nothing(data, made):
    samples, facts = data
    yes = pl.lit(['yes'])
    zebra = pl.lit(['Zebra'])
    label = pl.when(~HELD_OUT).then('label').when(RISK).then(yes).otherwise(zebra)
    other = samples.with_columns(label=label)
    assert not other.equals(samples)
    assert same(made, baselines(other, facts))


def without(sample_id, predictions):
    "Predictions of all other samples."
    others = pl.col('sample_id') != sample_id
    return {system: rows.filter(others) for system, rows in predictions.items()}


def test_held_out_facts_change_no_other_prediction(data, made):
    "Codes, cuts and models come from training patients: one held-out patient rewritten leaves other answers alone."
    samples, facts = data
    one = samples.filter(HELD_OUT)['sample_id'][0]
    labs_of_one = (pl.col('sample_id') == one) & (pl.col('table') == 'labevents')
    rewritten = pl.lit(lab('Lactate', 99))
    cells = pl.when(labs_of_one).then(rewritten).otherwise('cells')
    again = baselines(samples, facts.with_columns(cells=cells))
    assert same(without(one, made), without(one, again))
    assert not same(made, again)


def test_order_workers_and_repetition_change_nothing(data, made):
    samples, facts = data
    shuffled = samples.sample(fraction=1, shuffle=True, seed=3)
    assert same(made, baselines(shuffled, facts, workers=2))


def test_facts_may_be_a_function_that_never_sees_labels(data, made):
    samples, facts = data

    def ask(part):
        assert 'label' not in part.columns
        assert part['task'].n_unique() == 1
        ids = part.select('sample_id')
        return facts.join(ids, on='sample_id', how='semi', maintain_order='left')

    assert same(made, baselines(samples, ask))


# ---- what is fallen back to

def test_few_samples_fall_back_and_say_so(data):
    samples, facts = data
    few = samples.filter(pl.col('subject_id') < 20)
    made = baselines(few, facts, seed=0)
    logistic, frequency = made['logistic'], made['frequency']
    assert logistic['answer'].equals(frequency['answer'])
    assert logistic['risk'].equals(frequency['risk'])
    assert set(logistic['fallback']) == {'28 training samples'}
    assert set(made['boosting']['fallback']) == {'28 training samples'}


def test_tasks_without_training_samples(data):
    samples, facts = data
    made = baselines(samples.filter(HELD_OUT), facts, seed=0)
    assert set(made['frequency']['fallback']) == {'no training samples'}
    risks = made['majority']['risk'].drop_nulls()
    assert risks.unique().to_list() == [.5]
    decisions = made['logistic'].filter(pl.col('task') == 'prescriptions')
    assert decisions['answer'].list.len().max() == 0


def test_a_task_with_one_class(data):
    samples, facts = data
    no = pl.lit(['no'])
    label = pl.when(HELD_OUT).then('label').otherwise(no)
    never = samples.filter(RISK).with_columns(label=label)
    boosting = fit_task(never, facts)['boosting']
    assert boosting['risk'].unique().to_list() == [0]
    assert boosting['fallback'][0] == '0 training samples of one class'


def test_without_tuning_patients(data):
    samples, facts = data
    untuned = samples.filter(pl.col('split') != 'tuning')
    logistic = baselines(untuned, facts, seed=0)['logistic']
    assert logistic['fallback'].null_count() == logistic.height


def test_without_held_out_patients(data):
    samples, facts = data
    made = baselines(samples.filter(~HELD_OUT), facts, seed=0)
    assert {predictions.height for predictions in made.values()} == {0}


def test_a_patient_in_two_splits_is_refused(data):
    samples, facts = data
    one_patient = samples.filter(RISK).with_columns(subject_id=pl.lit(1))
    with pytest.raises(ValueError, match='two splits'):
        fit_task(one_patient, facts)


# ---- what is counted

BY_HAND = [
    ('s', 'labevents', lab('Lactate', '4.1', 'mmol/L', 'abnormal')),
    ('s', 'medrecon', 'Aspirin\x1fA\x1eB'),
    ('s', 'medrecon', '\x1f'),
    ('s', 'omr', 'Blood Pressure\x1f110/65'),
    ('s', 'labevents', lab('Culture', 'positive')),
    ('s', 'icustays', ''),
    ('s', 'triage', '\x1f\x1f\x1f\x1f\x1f\x1funable\x1f2.0\x1fAbd pain, N/V')]
COUNTED_BY_HAND = [
    ('labevents:flag=abnormal', None),
    ('labevents:item_name=Culture', None),
    ('labevents:item_name=Lactate', None),
    ('labevents:valuenum=Lactate', 4.1),
    ('medrecon:ATC Type=A', None),
    ('medrecon:ATC Type=B', None),
    ('medrecon:name=Aspirin', None),
    ('omr:result_name=Blood Pressure', None),
    ('omr:result_value=Blood Pressure', 110.),
    ('triage:acuity', 2.),
    ('triage:word=abd', None),
    ('triage:word=n', None),
    ('triage:word=pain', None),
    ('triage:word=v', None)]


def test_observations_by_hand():
    seen = observations(frame(BY_HAND))
    rows = seen.select(pl.col('code').cast(pl.String), 'value').rows()
    found = [(code, value) for code, value in rows if not code.startswith('rows')]
    assert sorted(found) == COUNTED_BY_HAND


def test_rows_of_a_table_are_counted():
    seen = observations(frame(BY_HAND))
    of_medrecon = pl.col('code').cast(pl.String) == 'rows:medrecon'
    assert seen.filter(of_medrecon).height == 2


IDS = [f's{i:02d}' for i in range(40)]


@pytest.fixture(scope='module')
def forty():
    "Observations of 40 samples, lactate rising from one to the next, and a rare result in the last."
    rows = [(sample, 'labevents', lab('Lactate', i)) for i, sample in enumerate(IDS)]
    rare = ('s39', 'labevents', lab('Rare', 1))
    return observations(frame([*rows, rare]))


@pytest.fixture(scope='module')
def learnt(forty):
    "What the first 30 of them teach."
    training = pl.col('sample_id').cast(pl.String) < 's30'
    return learn_vocabulary(forty.filter(training))


def test_cuts_come_from_training_samples(learnt):
    assert learnt.cuts['cut'].sort().to_list() == [3, 6, 9, 12, 15, 18, 21, 24, 27]


def test_columns_come_from_training_samples(forty, learnt):
    counts = count_matrix(forty, IDS, learnt).toarray()
    names = [f'{code}~{part}' for code, part in learnt.columns.iter_rows()]
    assert not any('Rare' in name for name in names)
    rows_of_labs = counts[:, names.index('rows:labevents~-1')]
    assert rows_of_labs.tolist() == [1.]*39 + [2.]
    assert counts.shape == (40, learnt.columns.height)


def test_scaled_rows_have_length_one(forty, learnt):
    scaled = unit_rows(count_matrix(forty, IDS, learnt)).toarray()
    assert np.allclose(np.linalg.norm(scaled, axis=1), 1)


def test_latest_value_wins():
    rows = [(f's{i}', 'labevents', lab('Lactate', value)) for i in range(6) for value in (1, 5 + i)]
    seen = observations(frame(rows))
    ids = [f's{i}' for i in range(7)]
    counts = count_matrix(seen, ids, learn_vocabulary(seen))
    lactate = dense_features(seen, ids, counts, np.ones(7, bool))[:, -1]
    assert lactate[:6].tolist() == [5, 6, 7, 8, 9, 10]
    assert np.isnan(lactate[6])


def test_every_counted_table_names_its_columns():
    assert all(COUNTED.values())
    assert set(WORDS_COUNTED) <= set(MEASURED_COLUMNS)


def test_counted_columns_are_displayed():
    for table in {*COUNTED, *MEASURED_COLUMNS}:
        asked = set(COUNTED.get(table, []))
        for pair in MEASURED_COLUMNS.get(table, []):
            asked.update(column for column in pair if column)
        assert asked <= set(DISPLAY[table].columns), table


def test_f1_at_k_by_hand():
    gold = np.array([[0, 1], [1, 0]])
    size = np.array([1, 2])
    assert np.allclose(f1_at_k(gold, size), [[0, 2/3], [2/3, 2/4]])


def test_the_best_cut_by_hand_is_a_threshold():
    chance = np.array([[.9, .8, .1], [.9, .3, .1]])
    gold = np.array([[1, 1, 0], [1, 0, 0]])
    cut = best_cut(chance, gold, np.array([2, 1]))
    rows = np.array([[.9, .8, .1], [.9, .2, .1], [.1, .02, .01]])
    answers = [cut.answer(row, ['a', 'b', 'c']) for row in rows]
    assert [len(answer) for answer in answers] == [2, 1, 1]


def test_the_best_cut_by_hand_is_a_number():
    chance = np.tile([.5, .5, .5], (4, 1))
    gold = np.tile([1, 1, 0], (4, 1))
    assert best_cut(chance, gold, np.full(4, 2)).k == 2


# ---- what a language model is given

OLD, NEW = '## Lab Results [+1 h]\nLactate p95', '## Lab Results [+4 h]\nSodium p50'
STAY = record_text(['## Patient Demographics\nF', OLD, *[NEW]*20], TASKS['Inpatient_Mortality'].instruction)


@pytest.mark.parametrize(('context', 'is_shown'), [(90, False), (1000, True)])
def test_only_lines_that_are_left_of_a_cut_record_are_seen(context, is_shown):
    tokenizer = train_tokenizer([STAY]*50, 600, by_line=True)
    lines = given_lines(STAY, 'Inpatient_Mortality', Prompter(tokenizer, context, 0, 'binned', True))
    assert ('## Lab Results: Lactate p95' in lines) == is_shown
    assert '## Lab Results: Sodium p50' in lines
    assert not any(TASKS['Inpatient_Mortality'].instruction in line for line in lines)


def test_lines_that_few_training_samples_have_are_no_columns():
    lines = [['common', f'own {i}'] for i in range(6)]
    training = np.arange(6) < 5
    assert line_matrix(lines, training).toarray().tolist() == [[1]]*6
    assert line_matrix(lines, np.arange(6) < 4).nnz == 0


def test_last_hours_are_counted_from_the_latest_row():
    hours = [0, 3, 9, None]
    times = [hour if hour is None else datetime(2180, 1, 1, hour) for hour in hours]
    rows = pl.DataFrame(dict(sample_id='s', time=times), schema_overrides=dict(time=pl.Datetime('us')))
    assert of_last_hours(rows, 6)['time'].to_list() == times[2:3]
    assert of_last_hours(rows, 7)['time'].to_list() == times[1:3]


# ---- files

def as_samples(planted_rows):
    "The same with all columns of samples; admissions are numbered."
    samples = planted_rows.with_columns(hadm_id=pl.int_range(pl.len()))
    lacking = {name: kind for name, kind in SAMPLES.items() if name not in samples.columns}
    nulls = [pl.lit(None, kind).alias(name) for name, kind in lacking.items()]
    return samples.with_columns(nulls).select(list(SAMPLES))


@pytest.fixture(scope='module')
def written(data, tmp_path_factory):
    "A run that has samples and nothing else."
    run = Run('x', tmp_path_factory.mktemp('home'))
    samples = as_samples(data[0])
    for name, part in (('ehr_ins', ~HELD_OUT), ('ehr_bench', HELD_OUT)):
        folder = run.samples/name
        folder.mkdir(parents=True)
        samples.filter(part).write_parquet(folder/'shard-00000.parquet')
    return run


@pytest.fixture(scope='module')
def read(written):
    return read_samples(written, profile('smoke'))


@pytest.fixture(scope='module')
def truth(read):
    "The labels of the held-out risks as true risks."
    risk = (pl.col('label').list.first() == 'yes').cast(pl.Float64)
    asked = read.filter(HELD_OUT & RISK)
    return asked.select('task', 'subject_id', 'hadm_id', 'stay_id', risk=risk)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope='module')
def predicted(read, data, truth, tmp_path_factory):
    "The folder of predictions."
    folder = tmp_path_factory.mktemp('made')/'predictions'
    predict_baselines(read, data[1], folder, truth, workers=1, progress=False, lines=as_lines(data[1]))
    return folder


def test_samples_are_read_without_their_texts(data, read):
    assert read.height == data[0].height
    assert not {'messages', 'candidates'} & set(read.columns)


def test_every_system_has_a_file(predicted):
    expected = {f'{system}.parquet' for system in (*SYSTEMS, 'ceiling')}
    assert set(contents(predicted)) == expected


def test_predictions_made_again_are_the_same_bytes(predicted, read, data, truth):
    first = contents(predicted)
    predict_baselines(read, data[1], predicted, truth, workers=1, progress=False, lines=as_lines(data[1]))
    assert first == contents(predicted)


def test_predictions_become_tables_of_scores(predicted, read, tmp_path):
    held_out = read.filter(HELD_OUT)
    score_run(held_out, read_predictions(predicted), tmp_path/'scores', replicates=20)
    scores = pl.read_csv(tmp_path/'scores'/'scores.csv')
    of_ceiling = scores.filter(system='ceiling', task='overall', metric='auroc')
    assert of_ceiling['value'].item() == 1
    assert scores.height == pl.read_parquet(tmp_path/'scores'/'scores.parquet').height
    tables = ('scores', 'comparisons', 'calibration')
    expected = {f'{table}.{kind}' for table in tables for kind in ('csv', 'parquet')}
    assert set(contents(tmp_path/'scores')) == expected


ASKED = dict(
    sample_id=['a', 'b', 'c'],
    subject_id=[1, 1, 2],
    task=['ICU_Mortality_1day', 'Readmission_30day', 'Readmission_30day'],
    family=['risk', 'risk', 'risk'],
    hadm_id=[7, 7, 8],
    stay_id=[5, None, None])
TRUE_RISKS = dict(
    task=['ICU_Mortality_1day', 'ICU_Mortality_1day', 'Readmission_30day', 'ED_Hospitalization'],
    subject_id=[1, 1, 1, 1],
    hadm_id=[7, 7, 7, None],
    stay_id=[5, 6, None, 5],
    risk=[.1, .2, .3, .4])


def test_ceiling_matches_stays_and_admissions():
    made = predict_ceiling(pl.DataFrame(ASKED), pl.DataFrame(TRUE_RISKS))
    risks = dict(zip(made['sample_id'], made['risk']))
    assert risks == dict(a=.1, b=.3, c=None)


def test_ceiling_says_what_the_truth_lacks():
    made = predict_ceiling(pl.DataFrame(ASKED), pl.DataFrame(TRUE_RISKS))
    assert made.filter(sample_id='c')['fallback'].item() == 'not in truth'


def test_a_truth_that_says_it_twice_is_refused():
    truth = pl.DataFrame(TRUE_RISKS)
    twice = pl.concat([truth, truth])
    with pytest.raises(ValueError, match='more than once'):
        predict_ceiling(pl.DataFrame(ASKED), twice)


def test_published_results_are_readable():
    table = published()
    assert table['value'].null_count() == 0
    found = table.filter(system='EHR-R1-72B', metric='F1')
    row = found.row(0, named=True)
    assert row['value'] == .6744
    assert row['half_width_95'] == .016
