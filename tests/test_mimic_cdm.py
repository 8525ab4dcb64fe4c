"""MIMIC-IV-Ext-CDM: both published layouts, hand-computed scores, patients of training, and files of nobody."""
import json
import pickle
import re

import pandas as pd
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from ehr_r1.config import Run
from ehr_r1.data.events import STORE
from ehr_r1.data.samples import SAMPLES
from ehr_r1.data.table_files import TableError
from ehr_r1.data.tables import SYNTHETIC_LICENCE, open_source
from ehr_r1.hospital.hospital import build_hospital
from ehr_r1.profiles import profile
from ehr_r1.stages import read_manifest
from ehr_r1.transfer.benchmark_stage import build_benchmark
from ehr_r1.transfer.mimic_cdm.baselines import best_titles, cdm_baselines, diseases_by_words
from ehr_r1.transfer.mimic_cdm.benchmark import (
    CDM_QUESTION,
    MIMIC_CDM,
    cdm_context,
    cdm_questions,
    cdm_score,
    for_run,
    named_diseases,
    patients_seen,
)
from ehr_r1.transfer.mimic_cdm.cases import lab_line, read_cdm_cases
from ehr_r1.transfer.mimic_cdm.files import (
    _REPORT_KEYS,
    CDM_DISEASES,
    RECORD_KEYS,
    cdm_is_synthetic,
    pickle_name,
    read_cdm_records,
)
from ehr_r1.transfer.mimic_cdm.synthetic import build_cdm_files, write_cdm_files
from ehr_r1.transfer.question_sets import ANSWERS, QUESTIONS, asked_questions

SMOKE = profile('smoke', other_per_task=0, replicates=50)
quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# -- records

NAMES = '''itemid,label,fluid,category,count,corresponding_ids
50956,Lipase,Blood,Chemistry,9,[50956]
51492,Protein,Urine,Chemistry,9,"[51492, 51102]"
,Lip,Blood,,,[50956]
90039,URINE CULTURE,,,,[90039]
'''


def record(subject=10000001, titles=('Acute pancreatitis',), **changes):
    "One admission as in a pickle of the authors."
    report = {
        'Note ID': f'{subject}-RR-3', 'Modality': 'CT', 'Region': 'Abdomen', 'Exam Name': 'CT ABD',
        'Report': 'FINDINGS:\n\n ____ with stranding \n\n',
    }
    return {
        'Patient History': 'Pain  in the\nepigastrium.',
        'Physical Examination': 'ABD: tender',
        'Laboratory Tests': {50956: '900.0 IU/L', 51492: 'NEG', 7: '5'},
        'Reference Range Lower': {50956: 0.0, 51492: float('nan')},
        'Reference Range Upper': {50956: 60.0, 51492: float('nan')},
        'Microbiology': {90039: 'NO GROWTH.'},
        'Radiology': [report],
        'Discharge Diagnosis': 'acute pancreatitis',
        'ICD Diagnosis': list(titles),
        'Procedures ICD9 Title': ['Appendectomy'],
    } | changes


def pickles(folder, mapping=NAMES, **found):
    "The four pickles in a folder, with these records by disease."
    for disease in CDM_DISEASES:
        (folder/pickle_name(disease)).write_bytes(pickle.dumps(found.get(disease, {}), protocol=4))
    if mapping:
        (folder/'lab_test_mapping.csv').write_text(mapping)
    return folder


def one_case(folder, **changes):
    "The case that is read from one record, and the counts."
    (case,), counts = read_cdm_cases(pickles(folder, pancreatitis={20000001: record(**changes)}))
    return case, counts


def test_a_case_as_it_is_shown(tmp_path):
    case, _ = one_case(tmp_path)
    assert (case.disease, case.hadm_id, case.subject_id) == ('pancreatitis', 20000001, 10000001)
    assert case.titles == ['Acute pancreatitis']
    assert cdm_context(case) == [
        '## Labs\n- Protein (Urine) NEG\n- test 7 5',
        '## Abnormal labs\n- Lipase 900 IU/L [0-60] high',
        '## History\nPain in the epigastrium.',
        '## Physical examination\nABD: tender',
        '## Microbiology\n- URINE CULTURE: NO GROWTH.',
        '## Radiology\nCT ABD:\nFINDINGS:\n____ with stranding',
    ]


@pytest.mark.parametrize('word', ['pancreatitis', 'appendectomy', 'discharge'])
def test_what_gives_the_answer_away_is_not_shown(tmp_path, word):
    case, _ = one_case(tmp_path)
    assert word not in '\n'.join(cdm_context(case)).lower()


@pytest.mark.parametrize('value, low, high, flag', [
    ('5.0 K/uL', '4.0', '10.0', ''),
    ('4.0', '4.0', '10.0', ''),
    ('3.9', '4.0', '10.0', 'low'),
    ('10.1', '4', '10', 'high'),
    ('-1', '0', '', 'low'),
    ('5', '', '', ''),
    ('99', 'nan', 'nan', ''),
    ('<0.6', '0.6', '1', 'low'),
    ('<0.7', '0.6', '1', ''),
    ('>1', '0.6', '1', 'high'),
    ('>0.9', '0.6', '1', ''),
    ('>0.1', '0.6', '1', ''),
    ('<5', '0.6', '1', ''),
    ('NEG', '0', '1', ''),
    ('12-20', '0', '1', ''),
    ('5', 'abc', '4', 'high'),
])
def test_flags(value, low, high, flag):
    assert lab_line('X', value, low, high).flag == flag


@pytest.mark.parametrize('key', RECORD_KEYS)
def test_missing_key_is_named(tmp_path, key):
    lacking = {name: value for name, value in record().items() if name != key}
    pickles(tmp_path, appendicitis={20000001: record(), 20000002: lacking})
    with pytest.raises(TableError, match=f"appendicitis_hadm_info_first_diag.pkl, row 2: no key '{key}' among "):
        read_cdm_cases(tmp_path)


def test_no_cultures_are_no_fault(tmp_path):
    _, counts = one_case(tmp_path, Microbiology={})
    assert counts['without cultures'] == 1


@pytest.mark.parametrize('changes, why', [
    ({'Patient History': ['x']}, 'a list where text should be'),
    ({'Physical Examination': True}, 'a bool where text should be'),
    ({'Radiology': {}}, "'Radiology' is a dict, not a list"),
    ({'Laboratory Tests': []}, "'Laboratory Tests' is a list, not a dict"),
    ({'ICD Diagnosis': 'Acute pancreatitis'}, "'ICD Diagnosis' is a str, not a list"),
    ({'Radiology': ['x']}, "without a key 'Report'"),
    ({'Laboratory Tests': {'x': '5'}}, "'x' is no identifier"),
    ({'Laboratory Tests': {1.5: '5'}}, "'1.5' is no identifier"),
])
def test_wrong_kinds_are_named(tmp_path, changes, why):
    with pytest.raises(TableError, match=re.escape(why)):
        one_case(tmp_path, **changes)


def test_pickle_that_is_no_dict(tmp_path):
    (pickles(tmp_path)/pickle_name('cholecystitis')).write_bytes(pickle.dumps([1]))
    with pytest.raises(TableError, match='cholecystitis.*no dict of admissions'):
        read_cdm_cases(tmp_path)


def test_record_that_is_no_dict(tmp_path):
    with pytest.raises(TableError, match='a record is no dict'):
        read_cdm_cases(pickles(tmp_path, cholecystitis={20000001: 'x'}))


@pytest.mark.parametrize('name', ['diverticulitis_hadm_info_first_diag.pkl', 'lab_test_mapping.csv'])
def test_missing_file_is_named(tmp_path, name):
    (pickles(tmp_path)/name).unlink()
    with pytest.raises(TableError, match=f'{name}: it is not in'):
        read_cdm_cases(tmp_path)


def test_names_from_a_pickled_frame_are_refused_with_the_remedy(tmp_path):
    pickles(tmp_path, mapping='')
    pd.DataFrame(dict(itemid=[50956], label=['Lipase'])).to_pickle(tmp_path/'lab_test_mapping.pkl')
    refusal = 'lab_test_mapping.pkl: it holds more than plain values.*nothing of it was run.*CSV files of the release'
    with pytest.raises(TableError, match=refusal):
        read_cdm_cases(tmp_path)
    (tmp_path/'lab_test_mapping.csv').write_text(NAMES)  # as the remedy says
    assert read_cdm_cases(tmp_path)[0] == []


def test_names_from_plain_dicts(tmp_path):
    pickles(tmp_path, mapping='', pancreatitis={20000001: record()})
    (tmp_path/'lab_test_mapping.pkl').write_bytes(pickle.dumps({50956: 'Lipase', 51492: 'Protein'}))
    (tmp_path/'microbiology_test_mapping.pkl').write_bytes(pickle.dumps({90039: 'Urine, cultured'}))
    (case,), _ = read_cdm_cases(tmp_path)
    assert '- Urine, cultured: NO GROWTH.' in case.cultures


def test_column_missing_in_the_names(tmp_path):
    with pytest.raises(TableError, match='lab_test_mapping.csv, column label'):
        read_cdm_cases(pickles(tmp_path, mapping='itemid,name\n1,x\n'))


def test_mixed_encodings(tmp_path):
    case, counts = one_case(tmp_path, **{
        'Patient History': 'café'.encode(),
        'Physical Examination': 'naïve'.encode('cp1252'),
        'ICD Diagnosis': ['Ménière'.encode('cp1252'), 'half \ud800'],
    })
    assert (case.history, case.exam) == ('café', 'naïve')
    assert case.titles == ['Ménière', 'half ?']
    assert counts['texts not in UTF-8'] == 2


def test_text_of_python_2(tmp_path):
    "Python 2 wrote text as bytes; so did its keys."
    values = {
        'Patient History': b'U\x05caf\xc3\xa9',
        'Physical Examination': b'U\x04caf\xe9',
        'Laboratory Tests': b'}',
        'Reference Range Lower': b'}',
        'Reference Range Upper': b'}',
        'Radiology': b']',
        'ICD Diagnosis': b']U\x09Gastritisa',
    }
    pairs = b''.join(b'U' + bytes([len(key)]) + key.encode() + value for key, value in values.items())
    data = b'\x80\x02}J\x81\x2e\x31\x01' + b'}(' + pairs + b'u' + b's.'
    (pickles(tmp_path)/pickle_name('appendicitis')).write_bytes(data)
    (case,), counts = read_cdm_cases(tmp_path)
    assert (case.history, case.exam, case.titles, case.subject_id) == ('café', 'café', ['Gastritis'], None)
    assert counts['texts not in UTF-8'] == 1


@pytest.mark.parametrize('nothing', ['', ' \n', None, float('nan')])
def test_empty_notes(tmp_path, nothing):
    case, counts = one_case(tmp_path, **{'Patient History': nothing, 'Physical Examination': nothing})
    assert case.history == case.exam == ''
    assert counts['without history'] == counts['without exam'] == 1
    assert all('History' not in part and 'examination' not in part for part in cdm_context(case))


NOTHING = {
    'Patient History': '', 'Physical Examination': '', 'Laboratory Tests': {}, 'Microbiology': {}, 'Radiology': [],
}


def test_what_cannot_be_asked_is_left_out_and_counted(tmp_path):
    untitled = {2: record(titles=()), 3: record(titles=('', float('nan')))}
    of_two = {4: record(subject=7)}
    appendicitis = {1: record(**NOTHING)} | untitled | of_two
    pickles(tmp_path, appendicitis=appendicitis, cholecystitis=of_two | {5: record(subject=7)})
    cases, counts = read_cdm_cases(tmp_path)
    assert [case.hadm_id for case in cases] == [5]
    assert counts['left out: empty'] == 1
    assert counts['left out: no ICD title'] == 2
    assert counts['left out: admission stands twice'] == 2


def test_admission_twice_in_one_file(tmp_path):
    pickles(tmp_path, appendicitis={20000001: record(), '20000001': record(), 20000002.0: record()})
    cases, counts = read_cdm_cases(tmp_path)
    assert [case.hadm_id for case in cases] == [20000002]
    assert counts['left out: admission stands twice'] == 2


def test_a_patient_twice_is_one_patient(tmp_path):
    of_one = {1: record(subject=7), 2: record(subject=7)}
    pickles(tmp_path, appendicitis=of_one, pancreatitis={3: record(Radiology=[])})
    questions, counts = cdm_questions(tmp_path, SMOKE)
    assert dict(questions.select('sample_id', 'group').rows()) == {'1': '7', '2': '7', '3': 'admission 3'}
    assert (counts['patients'], counts['patient unknown']) == (2, 1)


def test_notes_of_two_patients_in_one_record(tmp_path):
    reports = [{'Note ID': f'{subject}-RR-1', 'Report': 'x'} for subject in (1, 2)]
    with pytest.raises(TableError, match='row 1: its radiology notes are of two patients'):
        one_case(tmp_path, Radiology=reports)


# -- the CSV release

RELEASE = {
    'history_of_present_illness': 'hadm_id,hpi\n20000001,"Pain  in the\nepigastrium."\n',
    'physical_examination': 'hadm_id,pe\n20000001,ABD: tender\n',
    'laboratory_tests': 'hadm_id,itemid,valuestr,ref_range_lower,ref_range_upper\n'
                        '20000001,50956,900.0 IU/L,0.0,60.0\n20000001,51492.0,NEG,,\n20000001,7,5,,\n',
    'microbiology': 'hadm_id,test_itemid,valuestr,spec_itemid\n20000001,90039,NO GROWTH.,70079\n',
    'radiology_reports': 'hadm_id,note_id,modality,region,exam_name,text\n20000001,10000001-RR-3,CT,Abdomen,CT ABD,'
                         '"FINDINGS:\n\n ____ with stranding \n\n"\n',
    'icd_diagnosis': 'hadm_id,icd_diagnosis\n20000001,Acute pancreatitis\n',
    'lab_test_mapping': NAMES,
}
NOBODY = dict.fromkeys(CDM_DISEASES, [])


def release(folder, ids=None):
    "The CSV release in a folder: one admission, as `record` has it."
    for table, text in RELEASE.items():
        (folder/f'{table}.csv').write_text(text)
    (folder/'pathology_ids.json').write_text(json.dumps(ids or NOBODY | {'pancreatitis': [20000001]}))
    return folder


@pytest.fixture
def both_layouts(tmp_path):
    "Folders of a release and of pickles with the same admission."
    for name in ('release', 'pickles'):
        (tmp_path/name).mkdir()
    return release(tmp_path/'release'), pickles(tmp_path/'pickles', pancreatitis={20000001: record()})


def test_both_layouts_say_the_same(both_layouts):
    assert read_cdm_cases(both_layouts[0]) == read_cdm_cases(both_layouts[1])


def test_the_files_of_both_layouts(both_layouts):
    assert 'pathology_ids.json' in MIMIC_CDM.files(both_layouts[0])
    assert len(MIMIC_CDM.files(both_layouts[1])) == 5


def test_release_with_a_missing_column(tmp_path):
    (release(tmp_path)/'laboratory_tests.csv').write_text('hadm_id,itemid,value\n1,2,3\n')
    with pytest.raises(TableError, match='laboratory_tests.csv, column valuestr'):
        read_cdm_cases(tmp_path)


def test_release_in_another_encoding(tmp_path):
    (release(tmp_path)/'physical_examination.csv').write_bytes('hadm_id,pe\n20000001,naïve\n'.encode('cp1252'))
    with pytest.raises(TableError, match='physical_examination.csv: line 2 is not UTF-8'):
        read_cdm_cases(tmp_path)


def test_release_with_an_admission_twice(tmp_path):
    with open(release(tmp_path)/'history_of_present_illness.csv', 'a') as file:
        file.write('20000001,again\n')
    with pytest.raises(TableError, match='history_of_present_illness.csv, row 2: an admission stands there twice'):
        read_cdm_cases(tmp_path)


@pytest.mark.parametrize('text', [
    '{',
    '[]',
    '{"appendicitis": []}',
    json.dumps(NOBODY | {'appendicitis': 1}),
    json.dumps(NOBODY | {'appendicitis': [[1]]}),
    '['*100_000,
], ids=['broken', 'list', 'one', 'number', 'nested', 'deep'])
def test_release_with_bad_lists(tmp_path, text):
    (release(tmp_path)/'pathology_ids.json').write_text(text)
    with pytest.raises(TableError, match='pathology_ids.json'):
        read_cdm_cases(tmp_path)


def test_release_without_a_record(tmp_path):
    release(tmp_path, {disease: [20000009] for disease in CDM_DISEASES})
    with pytest.raises(TableError, match="row 1: no key 'Patient History'"):
        read_cdm_cases(tmp_path)


def test_release_without_a_file(tmp_path):
    (release(tmp_path)/'microbiology.csv').unlink()
    with pytest.raises(TableError, match='microbiology.csv: it is not in'):
        read_cdm_cases(tmp_path)


# -- names

@pytest.mark.parametrize('line, initials', [
    ('Unspecified acute appendicitis', 'a'),
    ('ACUTE APPENDICITIS', 'a'),
    ('Acute appendicitis with perforation', 'a'),
    ('ruptured appendix', 'a'),
    ('Appendiceal abscess', 'a'),
    ('apendicitis', 'a'),
    ('Acute appendicitis without mention of peritonitis', 'a'),
    ('Acquired absence of appendix', ''),
    ('appendectomy', ''),
    ('Malignant neoplasm of appendix', ''),
    ('Calculus of gallbladder with acute cholecystitis without obstruction', 'c'),
    ('Calculus of gallbladder with acute cholecystitis, without mention of obstruction', 'c'),
    ('Gangrene of gallbladder in cholecystitis', 'c'),
    ('Perforation of gall bladder', 'c'),
    ('Calculus of gallbladder without cholecystitis without obstruction', ''),
    ('Calculus of gallbladder without mention of cholecystitis, without mention of obstruction', ''),
    ('Cholangitis', ''),
    ('Calculus of gallbladder', ''),
    ('Diverticulitis of large intestine with perforation and abscess without bleeding', 'd'),
    ('Diverticulitis of colon (without mention of hemorrhage)', 'd'),
    ('Diverticular abscess', 'd'),
    ('diverticullitis', 'd'),
    ('Diverticulosis of large intestine without perforation or abscess without bleeding', ''),
    ('Diverticulosis of colon with hemorrhage', ''),
    ('Acute pancreatitis without necrosis or infection, unspecified', 'p'),
    ('Gallstone pancreatitis', 'p'),
    ('Infected pancreatic necrosis', 'p'),
    ('Pancreatic cancer', ''),
    ('Chronic hepatitis', ''),
    ('Acute pancreatitis and cholecystitis', 'cp'),
    ('No appendicitis, acute pancreatitis', 'p'),
    ('', ''),
])
def test_diseases_that_a_line_names(line, initials):
    assert ''.join(disease[0] for disease in named_diseases([line])) == initials


# -- scores

def questions_of(*rows):
    "Questions from (patient, disease, titles)."
    common = dict(split='held_out', kind='decision', context=['x'], question=CDM_QUESTION)
    return pl.DataFrame([dict(sample_id=str(number), group=group, task=disease, gold=titles) | common
                         for number, (group, disease, titles) in enumerate(rows)], schema=QUESTIONS)


def answers_of(*texts):
    "Answers to the questions in their order; None is an empty answer, `...` no answer at all."
    rows = [dict(sample_id=str(number), text=text, status='answered') for number, text in enumerate(texts)]
    return pl.DataFrame([row for row in rows if row['text'] is not ...], schema=ANSWERS)


def score_of(results, metric, task='overall', column='value', system=None):
    "One number of a table of results."
    rows = results.filter((pl.col('metric') == metric) & (pl.col('task') == task))
    if system:
        rows = rows.filter(pl.col('system') == system)
    return rows[column].item()


@pytest.fixture(scope='module')
def by_hand():
    "Four questions, of which three were asked; two of one patient."
    questions = questions_of(
        ('1', 'appendicitis', ['Acute appendicitis', 'Hypokalemia']),
        ('1', 'pancreatitis', ['Acute pancreatitis']),
        ('2', 'cholecystitis', ['Cholecystitis']),
        ('3', 'diverticulitis', ['Diverticulitis']))
    answers = answers_of(
        '<think>pancreatitis</think>acute appendicitis\nAnemia\n', 'Acute pancreatitis\nCholecystitis', None, ...)
    return cdm_score(questions, {'s': answers}, SMOKE)


def test_accuracy_by_hand(by_hand):
    assert score_of(by_hand, 'accuracy') == 2/3
    assert score_of(by_hand, 'only') == 1/3


@pytest.mark.parametrize('disease, f1', [
    ('appendicitis', 2*1/(2 + 2)),
    ('pancreatitis', 2*1/(1 + 2)),
    ('cholecystitis', 0),
    ('diverticulitis', None),
])
def test_f1_by_hand(by_hand, disease, f1):
    assert score_of(by_hand, 'f1', disease) == f1


def test_f1_over_all_by_hand(by_hand):
    assert score_of(by_hand, 'f1') == pytest.approx((.5 + 2/3 + 0)/3)


def test_what_was_asked_is_counted(by_hand):
    assert score_of(by_hand, 'f1', column='missing') == 1
    assert score_of(by_hand, 'f1', column='groups') == 2
    assert score_of(by_hand, 'f1', 'diverticulitis', 'samples') == 0
    assert '3 of 4' in by_hand['note'][0]


def test_an_unclosed_chain_is_no_answer():
    questions = questions_of(('1', 'appendicitis', ['Acute appendicitis']))
    results = cdm_score(questions, {'s': answers_of('<think>Acute appendicitis')}, SMOKE)
    assert score_of(results, 'accuracy') == score_of(results, 'f1') == 0
    assert score_of(results, 'f1', column='missing') == 1


def test_naming_all_four_is_seen_through():
    questions = questions_of(*((disease, disease, [f'Acute {disease}']) for disease in CDM_DISEASES))
    results = cdm_score(questions, {'s': answers_of(*['\n'.join(CDM_DISEASES)]*4)}, SMOKE)
    assert score_of(results, 'accuracy') == 1
    assert score_of(results, 'only') == 0


some_titles = st.sets(st.sampled_from('abcdef'), min_size=1)
some_answers = st.sets(st.sampled_from('abcdefgh'), min_size=1)
some_disease = st.sampled_from(CDM_DISEASES)


@quick
@given(st.lists(st.tuples(some_titles, some_answers), min_size=1, max_size=12))
def test_f1_agrees_with_scikit_learn(rows):
    golds, said = zip(*rows)
    questions = questions_of(*((str(number), 'appendicitis', sorted(gold)) for number, gold in enumerate(golds)))
    answers = answers_of(*('\n'.join(sorted(titles)) for titles in said))
    results = cdm_score(questions, {'s': answers}, profile('smoke', replicates=2))
    bits = MultiLabelBinarizer(classes=list('abcdefgh'))
    theirs = f1_score(bits.fit_transform(golds), bits.transform(said), average='samples')
    assert score_of(results, 'f1') == pytest.approx(theirs)


@quick
@given(st.lists(st.tuples(some_disease, some_disease), min_size=1, max_size=12))
def test_accuracy_agrees_with_scikit_learn(rows):
    golds, said = zip(*rows)
    questions = questions_of(*((str(number), gold, ['x']) for number, gold in enumerate(golds)))
    answers = answers_of(*(f'Acute {disease}' for disease in said))
    results = cdm_score(questions, {'s': answers}, profile('smoke', replicates=2))
    theirs = accuracy_score(golds, said)
    assert score_of(results, 'accuracy') == pytest.approx(theirs)
    assert score_of(results, 'only') == pytest.approx(theirs)


def width_of_interval(rows, answers):
    results = cdm_score(questions_of(*rows), {'s': answers}, profile('smoke'))
    return score_of(results, 'accuracy', column='high') - score_of(results, 'accuracy', column='low')


def test_intervals_draw_patients():
    "Forty answers of four patients are four things known, not forty."
    many = [(str(i), 'appendicitis', ['Acute appendicitis']) for i in range(40)]
    few = [(str(i % 4), disease, titles) for i, (_, disease, titles) in enumerate(many)]
    answers = answers_of(*('Acute appendicitis' if i % 4 < 2 else 'Anemia' for i in range(40)))
    assert width_of_interval(many, answers) < .4 < width_of_interval(few, answers)


# -- baselines

SIGNS = dict(appendicitis='right lower quadrant', cholecystitis='murphy sign', diverticulitis='left lower quadrant',
             pancreatitis='pain goes to the back')


def world(size=60):
    "Questions that a telling word answers; two fifths are for appendicitis, one third is training."
    rows = []
    for number in range(size):
        disease = CDM_DISEASES[(0, 0, 1, 2, 3)[number % 5]]
        rows.append(dict(
            sample_id=f'{number:03}', group=str(number), task=disease, split='train' if number % 3 == 0 else 'held_out',
            kind='decision', context=[f'## History\n{SIGNS[disease]} for {number} days'], question=CDM_QUESTION,
            gold=[f'Acute {disease}', 'Hypertension']))
    return pl.DataFrame(rows, schema=QUESTIONS)


@pytest.fixture(scope='module')
def asked_world():
    "Questions, what the baselines answer, and the results."
    questions = world()
    said = cdm_baselines(None, SMOKE, questions)
    return questions, said, cdm_score(questions, said, SMOKE)


def test_baselines_answer_what_is_held_out(asked_world):
    questions, said, _ = asked_world
    held_out = questions.filter(pl.col('split') == 'held_out')
    assert set(said) == {'majority', 'frequency', 'keywords', 'logistic'}
    assert all(sorted(answers['sample_id']) == sorted(held_out['sample_id']) for answers in said.values())


@pytest.mark.parametrize('system', ['keywords', 'logistic'])
@pytest.mark.parametrize('metric', ['accuracy', 'f1'])
def test_baselines_that_read_find_the_disease(asked_world, system, metric):
    assert score_of(asked_world[2], metric, system=system) == 1


def test_majority_is_right_as_often_as_its_disease_occurs(asked_world):
    questions, said, results = asked_world
    held_out = questions.filter(pl.col('split') == 'held_out')
    assert score_of(results, 'accuracy', system='majority') == (held_out['task'] == 'appendicitis').mean()
    (text,) = set(said['majority']['text'])
    assert sorted(text.split('\n')) == ['Acute appendicitis', 'Hypertension']


def test_baselines_do_not_depend_on_the_order_of_the_questions():
    questions = world(20)
    reverse = cdm_baselines(None, SMOKE, questions.reverse())
    for system, answers in cdm_baselines(None, SMOKE, questions).items():
        assert answers.equals(reverse[system]), system


def test_no_baseline_sees_the_answers_of_the_patients_it_answers_for():
    questions, who = world(20), pl.col('sample_id') == '001'
    plague = pl.lit(['Plague'], pl.List(pl.String))
    changed = questions.with_columns(
        gold=pl.when(who).then(plague).otherwise('gold'),
        task=pl.when(who).then(pl.lit('pancreatitis')).otherwise('task'))
    before, after = (cdm_baselines(None, SMOKE, some) for some in (questions, changed))
    for system in before:
        assert before[system].filter(who).equals(after[system].filter(who)), system


def test_no_case_gives_no_answer():
    said = cdm_baselines(None, SMOKE, world(0))
    assert all(len(answers) == 0 for answers in said.values())
    systems, tasks, metrics = 4, 5, 3
    assert len(cdm_score(world(0), said, SMOKE)) == systems*tasks*metrics


def test_one_case_is_no_fault():
    questions = world(2)
    results = cdm_score(questions, cdm_baselines(None, SMOKE, questions), SMOKE)
    assert set(results['samples']) == {0, 1}


def test_nothing_to_learn_from_is_no_fault():
    assert diseases_by_words(['x'], ['appendicitis'], ['y', 'z']) == ['appendicitis']*2
    assert best_titles([]) == []


# -- patients of a run

def fake_run(root, source, seen, stays):
    "What `patients_seen` reads of a run: patients of EHR-Ins, and (patient, admission) of the trajectories."
    run = Run('r', root)
    for folder in (run.trajectories, run.samples/'ehr_ins', run.samples/'ehr_bench', run.checkpoints):
        folder.mkdir(parents=True)
    events = [dict(subject_id=subject, table='admissions', hadm_id=stay) for subject, stay in stays]
    samples = [dict(subject_id=subject, split='train') for subject in seen]
    pl.DataFrame(events, schema=STORE).write_parquet(run.trajectories/'shard-00000.parquet')
    pl.DataFrame(samples, schema=SAMPLES).write_parquet(run.samples/'ehr_ins'/'shard-00000.parquet')
    manifest = dict(key='k', counts=dict(source=source, access='open'), params={}, content='c')
    for folder in (run.trajectories, run.samples):
        (folder/'manifest.json').write_text(json.dumps(manifest))
    return run


@pytest.fixture
def cohort(tmp_path):
    "Five admissions: of patients 1, 2 and 3, and two whose patient no note names."
    (tmp_path/'cohort').mkdir()
    known = {101: record(subject=1), 102: record(subject=2)}
    unknown = {104: record(Radiology=[]), 105: record(Radiology=[])}
    return pickles(tmp_path/'cohort', appendicitis=known, pancreatitis={103: record(subject=3)} | unknown)


@pytest.fixture
def without_seen(tmp_path, cohort):
    "Questions and counts for a run that trained on patients 1 and 4; admission 104 is of patient 4."
    stays = [(1, 900), (4, 104), (4, 901), (2, 102)]
    run = fake_run(tmp_path, '3.1', {1, 4}, stays)
    return for_run(run, cohort).questions(cohort, SMOKE)


def test_patients_of_training_are_left_out(without_seen):
    questions, _ = without_seen
    assert dict(questions.select('sample_id', 'split').rows()) == {
        '101': 'train', '102': 'held_out', '103': 'held_out', '104': 'train', '105': 'held_out'}


def test_patients_of_training_are_counted(without_seen):
    _, counts = without_seen
    assert counts['seen in training'] == 2
    assert counts['held out'] == 3
    assert counts['access'] == 'credentialed'


def test_patients_of_training_are_not_asked(without_seen):
    questions, _ = without_seen
    assert set(asked_questions(questions, SMOKE)['sample_id']) == {'102', '103', '105'}
    for answers in cdm_baselines(None, SMOKE, questions).values():
        assert set(answers['sample_id']) == {'102', '103', '105'}


@pytest.mark.parametrize('source, licence, two_worlds', [
    ('synthetic', '', True),
    ('3.1', SYNTHETIC_LICENCE, True),
    ('synthetic', SYNTHETIC_LICENCE, False),
    ('3.1', '', False),
])
def test_numbers_of_two_worlds_are_not_compared(tmp_path, cohort, source, licence, two_worlds):
    run = fake_run(tmp_path, source, {1}, [(1, 101)])
    if licence:
        (cohort/'LICENSE.txt').write_text(licence)
    benchmark = for_run(run, cohort)
    assert (patients_seen(run, cohort) is None) == two_worlds
    assert (benchmark.questions(cohort, SMOKE)[1]['seen in training'] is None) == two_worlds
    assert benchmark.open == bool(licence)


# -- files of nobody, and the whole way

@pytest.fixture(scope='module')
def hospital(tmp_path_factory):
    "Tables of a synthetic hospital of 150 patients, as the stage of a run leaves them."
    folder = tmp_path_factory.mktemp('world')/'runs'/'r'/'hospital'
    folder.mkdir(parents=True)
    build_hospital(folder/'tables', 150, 3, workers=1, progress=False)
    (folder/'manifest.json').write_text(json.dumps(dict(key='h', content='c')))
    return folder/'tables'


@pytest.fixture(scope='module')
def made(hospital, tmp_path_factory):
    "The folder of the files that are made of it, and the counts."
    folder = tmp_path_factory.mktemp('made')
    return folder, write_cdm_files(open_source(hospital), folder)


@pytest.fixture(scope='module')
def made_records(made):
    "(disease, hadm_id, record) of the files."
    found = read_cdm_records(made[0])
    return [(disease, hadm_id, of_one) for disease, (_, records) in found.items()
            for hadm_id, of_one in records.items()]


def test_cases_are_counted(made, made_records):
    folder, counts = made
    assert sum(counts[disease] for disease in CDM_DISEASES) == len(made_records) > 5
    assert cdm_is_synthetic(folder)


def test_no_pickle_is_written(made):
    assert {file.suffix for file in made[0].iterdir()} == {'.csv', '.json', '.txt'}


def test_made_records_are_whole(made_records):
    for _, hadm_id, of_one in made_records:
        assert type(hadm_id) is int
        assert set(RECORD_KEYS) <= set(of_one)
        assert of_one['Laboratory Tests']
        assert of_one['Laboratory Tests'].keys() == of_one['Reference Range Lower'].keys()
        assert of_one['Laboratory Tests'].keys() == of_one['Reference Range Upper'].keys()


def test_made_records_do_not_tell_the_disease(made_records):
    for disease, _, of_one in made_records:
        assert disease in of_one['ICD Diagnosis'][0].lower()
        assert not re.search(disease, of_one['Patient History'] + of_one['Physical Examination'], re.I)


def test_made_reports_show_the_abdomen_and_do_not_tell(made_records):
    for disease, _, of_one in made_records:
        assert any(report['Region'] == 'Abdomen' for report in of_one['Radiology'])
        for report in of_one['Radiology']:
            assert set(report) == set(_REPORT_KEYS)
            assert not re.search(f'{disease}|IMPRESSION|INDICATION', report['Report'], re.I)
            assert 'FINDINGS:\n' in report['Report']


def test_the_first_result_of_a_test_is_the_one_shown(hospital, made_records):
    labs = open_source(hospital).scan('labevents').filter(pl.col('hadm_id').is_not_null())
    labs = labs.sort('charttime', 'labevent_id').collect()
    for _, hadm_id, of_one in made_records[:3]:
        first = labs.filter(pl.col('hadm_id') == hadm_id).unique('itemid', keep='first', maintain_order=True)
        assert len(of_one['Laboratory Tests']) == len(first)
        for item, number, unit in first.drop_nulls('valuenum').select('itemid', 'valuenum', 'valueuom').rows():
            assert of_one['Laboratory Tests'][str(item)] == (f'{number} {unit}' if unit else str(number))


def test_only_a_synthetic_hospital_makes_files(tmp_path, hospital):
    source = open_source(hospital)
    source.__dict__['version'] = '3.1'
    with pytest.raises(TableError, match='it is no synthetic hospital'):
        write_cdm_files(source, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def whole_way(hospital):
    "A run that trained on every second patient, with the folder of the files and the benchmark built once."
    root = hospital.parents[3]
    folder = build_cdm_files(Run('r', root))
    cases = read_cdm_cases(folder)[0]
    seen = {case.subject_id for case in cases[::2]}
    run = fake_run(root, 'synthetic', seen, [(case.subject_id, case.hadm_id) for case in cases])
    assert build_benchmark(run, SMOKE, for_run(run, folder), folder)
    return run, folder


def test_finished_stages_are_not_made_again(whole_way):
    run, folder = whole_way
    before = (folder/'manifest.json').stat().st_mtime_ns
    assert build_cdm_files(run) == folder
    assert (folder/'manifest.json').stat().st_mtime_ns == before
    assert not build_benchmark(run, SMOKE, for_run(run, folder), folder)


def test_from_hospital_to_scores(whole_way):
    run, folder = whole_way
    out = run.folder/'transfer'/'mimic_cdm'
    counts, results = read_manifest(out)['counts'], pl.read_parquet(out/'results.parquet')
    assert counts['access'] == 'open'
    assert 0 < counts['seen in training'] < len(read_cdm_cases(folder)[0])
    assert counts['systems'] == ['frequency', 'keywords', 'logistic', 'majority']
    assert score_of(results, 'accuracy', column='samples', system='keywords') == counts['held out'] == counts['asked']
    assert score_of(results, 'accuracy', system='keywords') > score_of(results, 'accuracy', system='majority')
