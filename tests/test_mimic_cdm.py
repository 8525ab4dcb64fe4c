"MIMIC-IV-CDM: pickles that are never run, both published layouts, hand-computed scores, patients of training, and files of nobody."
import collections, copyreg, datetime, io, json, os, pickle, pickletools, re, tracemalloc
from pathlib import Path
import numpy as np, pandas as pd, polars as pl, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import MultiLabelBinarizer
import ehr_r1.transfer.mimic_cdm.plain_pickle as module
from ehr_r1.config import Run
from ehr_r1.profiles import profile
from ehr_r1.stages import read_manifest
from ehr_r1.hospital.hospital import build_hospital
from ehr_r1.data.samples import SAMPLES
from ehr_r1.data.tables import TableError, open_source
from ehr_r1.data.trajectories import STORE
from ehr_r1.transfer.question_sets import ANSWERS, QUESTIONS, asked_questions
from ehr_r1.transfer.benchmark_stage import build_benchmark
from ehr_r1.transfer.mimic_cdm.files import DISEASES, NEEDED, build_cases, lab_line, made_up, read_cases, write_cases
from ehr_r1.transfer.mimic_cdm.cases import (
    BENCHMARK, QUESTION, best_titles, by_words, cdm_baselines, cdm_questions, cdm_score, context_of, for_run,
    named_diseases, patients_seen)
from ehr_r1.transfer.mimic_cdm.plain_pickle import plain_bytes, read_plain

SMOKE = profile('smoke', lm_per_task=0, replicates=50)
quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# -- plain pickles

scalars = st.none() | st.booleans() | st.integers(-2**63, 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=20)
keys = st.integers(-2**31, 2**40) | st.text(max_size=8)
plain = st.recursive(scalars, lambda x: st.lists(x, max_size=4) | st.lists(x, max_size=4).map(tuple) | st.dictionaries(keys, x, max_size=3), max_leaves=12)

def kinds(value): # the value with the type of everything in it
    if isinstance(value, dict): return dict, [(kinds(k), kinds(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)): return type(value), [kinds(x) for x in value]
    return type(value), repr(value)

@quick
@given(value=plain)
def test_plain_values_come_back(tmp_path, value):
    for protocol in range(6):
        (tmp_path/'x.pkl').write_bytes(pickle.dumps(value, protocol))
        assert kinds(read_plain(tmp_path/'x.pkl')) == kinds(value), protocol

@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_bytes_and_long_values_come_back(tmp_path, protocol):
    value = {b'key': [b'', b'x'*300, b'y'*70_000], 'text': 'ä'*70_000, 'list': list(range(3_000)), 'dict': {i: str(i % 7) for i in range(3_000)}}
    (tmp_path/'x.pkl').write_bytes(pickle.dumps(value, protocol))
    assert read_plain(tmp_path/'x.pkl') == value

@quick
@given(value=st.recursive(scalars, lambda x: st.lists(x, max_size=4) | st.dictionaries(keys, x, max_size=3), max_leaves=12))
def test_what_is_written_is_a_pickle(value): assert kinds(pickle.loads(plain_bytes(value))) == kinds(value)

def test_only_plain_values_are_written():
    for value in ({'a': {1, 2}}, [(1,)], datetime.date(2100, 1, 1), b'x'):
        with pytest.raises(TypeError, match='is no plain value'): plain_bytes(value)

# -- hostile pickles

class Calls:
    "Asks the loader to call a function."
    def __init__(self, f, *args, **more): self.answer = (f, args, *more.values())
    def __reduce_ex__(self, protocol): return self.answer

class Armed:
    "Does something when its state is set."
    def __setstate__(self, state): open(state['path'], 'w').close()
    def __getstate__(self): return {'path': os.environ['CAUGHT']}

class Stored(pickle.Pickler):
    def persistent_id(self, obj): return 'elsewhere' if obj == 'held' else None

def stored(value, protocol):
    out = io.BytesIO(); Stored(out, protocol).dump(value)
    return out.getvalue()

def touch(path): return Calls(os.system, f'touch {path}')
def dumped(make): return lambda path: [pickle.dumps(make(path), p) for p in range(6)]
def raw(*data): return lambda path: [d.replace(b'PATH', os.fsencode(path)) for d in data]

HOSTILE = dict(
    system=dumped(touch),
    inside_a_record=dumped(lambda path: {20000001: {k: '' for k in NEEDED} | {'Radiology': [{'Report': touch(path)}]}}),
    as_a_key=dumped(lambda path: {Calls(os.system, f'touch {path}'): 1}),
    evaluated=dumped(lambda path: Calls(eval, f'open({str(path)!r}, "w")')),
    executed=dumped(lambda path: Calls(exec, f'open({str(path)!r}, "w")')),
    opened=dumped(lambda path: Calls(open, str(path), 'w')),
    nested=dumped(lambda path: Calls(getattr, Calls(__import__, 'os'), 'system')),
    nested_call=dumped(lambda path: Calls(map, os.system, [f'touch {path}'])),
    setstate=dumped(lambda path: Armed()),
    state_of_a_call=dumped(lambda path: Calls(Armed, state={'path': str(path)})),
    items_of_a_call=dumped(lambda path: Calls(list, state=None, items=iter(['x']))),
    instance=raw(b"(S'touch PATH'\nios\nsystem\n."),
    object=raw(b"(cos\nsystem\nS'touch PATH'\no."),
    old_global=raw(b"cos\nsystem\n(S'touch PATH'\ntR.", b"cos\nsystem\n."),
    new_object=raw(b"\x80\x02cbuiltins\nobject\n)\x81.", b"\x80\x04cbuiltins\nobject\n)}\x92."),
    stack_global=raw(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x05touch\x85R."),
    built=raw(b"\x80\x02}}b.", b"\x80\x02]}b."),
    persistent=lambda path: [stored(['held'], p) for p in range(6)],
    extension=raw(b'\x80\x02\x82\xf0.', b'\x80\x02\x83\xf0\x00.', b'\x80\x02\x84\xf0\x00\x00\x00.'),
    buffers=raw(b'\x80\x05\x97.', b'\x80\x05\x8c\x01a\x98.', b'\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00a.'),
    sets=dumped(lambda path: {1, 2}), frozen_sets=dumped(lambda path: frozenset('a')),
    dates=dumped(lambda path: {'a': datetime.datetime(2100, 1, 1)}),
    numpy_numbers=dumped(lambda path: {np.int64(7): np.float64(.5)}),
    arrays=dumped(lambda path: np.arange(3)), frames=dumped(lambda path: pd.DataFrame(dict(itemid=[1]))),
    ordered=dumped(lambda path: collections.OrderedDict(a=1)), missing=dumped(lambda path: collections.defaultdict(list)),
    complex_numbers=dumped(lambda path: 1j), classes=dumped(lambda path: [str]), functions=dumped(lambda path: len))

@pytest.fixture
def caught(tmp_path, monkeypatch):
    path = tmp_path/'caught'
    monkeypatch.setenv('CAUGHT', str(path))
    monkeypatch.setitem(copyreg._inverted_registry, 0xf0, ('os', 'system'))
    return path

@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_pickle_is_refused_and_nothing_runs(tmp_path, caught, name):
    for i, data in enumerate(HOSTILE[name](caught)):
        (tmp_path/'x.pkl').write_bytes(data)
        with pytest.raises(TableError, match=r'x\.pkl: it (holds more than plain values \(\w+ at byte [\d,]+\); nothing of it was run|is damaged).*CSV files'):
            read_plain(tmp_path/'x.pkl')
        assert not caught.exists(), (name, i)

@pytest.mark.parametrize('name', ['system', 'inside_a_record', 'evaluated', 'opened', 'setstate', 'instance', 'old_global'])
def test_the_hostile_pickles_are_armed(caught, name):
    "Python's own loader falls for them; otherwise the test above would show nothing."
    try: pickle.loads(HOSTILE[name](caught)[0])
    except Exception: pass
    assert caught.exists()

def test_every_instruction_that_is_not_plain_is_refused(tmp_path):
    "All that Python's pickles can say, one by one, with whatever argument it takes."
    found = set()
    for op in pickletools.opcodes:
        for argument in (b'', b'1\n', b'a\na\n', b"'a'\n", b'\x00'*9):
            (tmp_path/'x.pkl').write_bytes(b'\x80\x04(N' + op.code.encode('latin-1') + argument + b'.')
            try: read_plain(tmp_path/'x.pkl')
            except TableError as e: found |= {op.name} & set(re.findall(r'plain values \((\w+) at byte 4\)', str(e)))
    assert found == {'GLOBAL', 'STACK_GLOBAL', 'REDUCE', 'BUILD', 'INST', 'OBJ', 'NEWOBJ', 'NEWOBJ_EX', 'PERSID', 'BINPERSID', 'EXT1', 'EXT2', 'EXT4',
                     'EMPTY_SET', 'ADDITEMS', 'FROZENSET', 'BYTEARRAY8', 'NEXT_BUFFER', 'READONLY_BUFFER', 'DUP', 'POP', 'POP_MARK'}

def refused(tmp_path, data, why):
    (tmp_path/'x.pkl').write_bytes(data)
    with pytest.raises(TableError, match=why): read_plain(tmp_path/'x.pkl')

@pytest.mark.parametrize('data, why', [
    (b'\x80\x04]\x94h\x00a.', 'two places'), (b'\x80\x04}\x94\x8c\x01ah\x00s.', 'two places'), # in itself
    (b'\x80\x02]q\x00]q\x01(h\x00h\x00ee.', 'two places'),
    (b'\x80\x04\x8a\xff' + b'\x01'*255 + b'.', 'more than 64 bits'), (b'L' + b'9'*3_000 + b'L\n.', 'more than 64 bits'), (b'I' + b'9'*9_999 + b'\n.', 'damaged'),
    (b'\x80\x04}(\x8c\x01aK\x01\x8c\x01aK\x02u.', 'stands twice'), (b'\x80\x04}]K\x01s.', 'neither text nor number'), (b'\x80\x04})K\x01s.', 'neither text nor number'),
    (b'\x80\x04}(K\x01u.', 'do not match'), (b'\x80\x04K\x01K\x02K\x03s.', 'do not match'), (b'\x80\x04K\x01K\x02a.', 'no list'),
    (b'\x80\x04]].', 'one value'), (b'\x80\x04(].', 'one value'), (b'\x80\x04].\x80\x04].', 'one value'), (b'\x80\x04.', 'one value'), (b'\x80\x04e.', 'damaged'), (b'\x80\x04h\x05.', 'damaged'),
    (b'', 'damaged'), (b'\x80\x04]', 'damaged'), (b'no pickle', 'damaged'), (b'\xff\xfe', 'damaged'),
    (b'\x80\x04\x8d' + (2**62).to_bytes(8, 'little') + b'a.', 'damaged'), (b'\x80\x04\x8e' + (2**62).to_bytes(8, 'little') + b'a.', 'damaged'),
    (b'\x80\x04\x8b\xff\xff\xff\x7fa.', 'damaged'), (b'\x80\x04\x8b\xff\xff\xff\xffa.', 'damaged')])
def test_malformed_pickle_is_refused(tmp_path, data, why): refused(tmp_path, data, why)

def test_claims_of_size_cost_nothing(tmp_path):
    "A frame of 2**63 bytes, a memo index of 2**31, texts and numbers that are said to be huge."
    bombs = [b'\x80\x04\x95' + b'\xff'*7 + b'\x7fN.', b'\x80\x02Nr\xff\xff\xff\x7f.', b'\x80\x04\x8d' + (2**40).to_bytes(8, 'little') + b'a.', b'\x80\x04\x8b\xff\xff\xff\x7fa.',
             b'Np2147483647\n.']
    tracemalloc.start()
    for data in bombs:
        (tmp_path/'x.pkl').write_bytes(data)
        try: assert read_plain(tmp_path/'x.pkl') is None
        except TableError: pass
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 2_000_000

def test_limits_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'FILE', 1_000)
    refused(tmp_path, b'\x80\x04]\x94(' + b'\x8c\xff' + b'x'*255 + b'\x94' + b'h\x01'*4 + b'e.', 'unfolds to more than 1,000 characters')
    refused(tmp_path, pickle.dumps('x'*2_000), 'more than 1,000 bytes')
    monkeypatch.setattr(module, 'STEPS', 50)
    refused(tmp_path, pickle.dumps(list(range(100))), 'more than 50 instructions')

def test_depth_is_no_danger(tmp_path):
    (tmp_path/'x.pkl').write_bytes(b'\x80\x02' + b']'*30_000 + b'a'*29_999 + b'.')
    value, depth = read_plain(tmp_path/'x.pkl'), 1
    while value: value = value.pop(); depth += 1
    assert depth == 30_000
    refused(tmp_path, b'\x80\x02}N' + b'\x85'*30_000 + b'K\x01s.', 'neither text nor number') # hashing such a key can end the interpreter

@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=plain, protocol=st.integers(0, 5), cuts=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4), junk=st.binary(max_size=30) | st.none())
def test_damage_gives_plain_values_or_a_clear_error(tmp_path, value, protocol, cuts, junk):
    data = bytearray(pickle.dumps(value, protocol) if junk is None else junk)
    for at, byte in cuts:
        if data: data[at % len(data)] = byte
    (tmp_path/'x.pkl').write_bytes(data)
    try: found = read_plain(tmp_path/'x.pkl')
    except TableError: return
    todo = [found]
    while todo:
        x = todo.pop()
        assert type(x) in (dict, list, tuple, str, bytes, int, float, bool, type(None))
        if type(x) is dict: todo += [*x, *x.values()]
        elif type(x) in (list, tuple): todo += x

def test_missing_file_says_so(tmp_path):
    with pytest.raises(TableError, match='x.pkl: it is not in'): read_plain(tmp_path/'x.pkl')

# -- records

NAMES = 'itemid,label,fluid,category,count,corresponding_ids\n50956,Lipase,Blood,Chemistry,9,[50956]\n51492,Protein,Urine,Chemistry,9,"[51492, 51102]"\n,Lip,Blood,,,[50956]\n90039,URINE CULTURE,,,,[90039]\n'

def record(subject=10000001, titles=('Acute pancreatitis',), **changes):
    return {'Patient History': 'Pain  in the\nepigastrium.', 'Physical Examination': 'ABD: tender', 'Laboratory Tests': {50956: '900.0 IU/L', 51492: 'NEG', 7: '5'},
            'Reference Range Lower': {50956: 0.0, 51492: float('nan')}, 'Reference Range Upper': {50956: 60.0, 51492: float('nan')}, 'Microbiology': {90039: 'NO GROWTH.'},
            'Radiology': [{'Note ID': f'{subject}-RR-3', 'Modality': 'CT', 'Region': 'Abdomen', 'Exam Name': 'CT ABD', 'Report': 'FINDINGS:\n\n ____ with stranding \n\n'}],
            'Discharge Diagnosis': 'acute pancreatitis', 'ICD Diagnosis': list(titles), 'Procedures ICD9 Title': ['Appendectomy']} | changes

def files(folder, mapping=NAMES, protocol=4, **found):
    for d in DISEASES: (folder/f'{d}_hadm_info_first_diag.pkl').write_bytes(pickle.dumps(found.get(d, {}), protocol))
    if mapping: (folder/'lab_test_mapping.csv').write_text(mapping)
    return folder

def case(tmp_path, **changes):
    (one,), counts = read_cases(files(tmp_path, pancreatitis={20000001: record(**changes)}))
    return one, counts

def test_a_case_as_it_is_shown(tmp_path):
    one, _ = case(tmp_path)
    assert (one.disease, one.hadm_id, one.subject_id, one.titles) == ('pancreatitis', 20000001, 10000001, ['Acute pancreatitis'])
    assert context_of(one) == ['## Labs\n- Protein (Urine) NEG\n- test 7 5', '## Abnormal labs\n- Lipase 900 IU/L [0-60] high', '## History\nPain in the epigastrium.',
                               '## Physical examination\nABD: tender', '## Microbiology\n- URINE CULTURE: NO GROWTH.', '## Radiology\nCT ABD:\nFINDINGS:\n____ with stranding']

def test_what_gives_the_answer_away_is_not_shown(tmp_path):
    shown = '\n'.join(context_of(case(tmp_path)[0])).lower()
    assert 'pancreatitis' not in shown and 'appendectomy' not in shown and 'discharge' not in shown

@pytest.mark.parametrize('value, low, high, flag', [
    ('5.0 K/uL', '4.0', '10.0', ''), ('4.0', '4.0', '10.0', ''), ('3.9', '4.0', '10.0', 'low'), ('10.1', '4', '10', 'high'), ('-1', '0', '', 'low'), ('5', '', '', ''), ('99', 'nan', 'nan', ''),
    ('<0.6', '0.6', '1', 'low'), ('<0.7', '0.6', '1', ''), ('>1', '0.6', '1', 'high'), ('>0.9', '0.6', '1', ''), ('>0.1', '0.6', '1', ''), ('<5', '0.6', '1', ''), ('NEG', '0', '1', ''), ('12-20', '0', '1', ''), ('5', 'abc', '4', 'high')])
def test_flags(value, low, high, flag): assert lab_line('X', value, low, high)[1] == flag

@pytest.mark.parametrize('key', NEEDED)
def test_missing_key_is_named(tmp_path, key):
    bad = {k: v for k, v in record().items() if k != key}
    files(tmp_path, appendicitis={20000001: record(), 20000002: bad})
    with pytest.raises(TableError, match=f"appendicitis_hadm_info_first_diag.pkl, row 2: no key '{key}' among "): read_cases(tmp_path)

def test_no_cultures_are_no_fault(tmp_path): assert case(tmp_path, Microbiology={})[1]['without cultures'] == 1

@pytest.mark.parametrize('changes, why', [
    ({'Patient History': ['x']}, 'a list where text should be'), ({'Radiology': {}}, "'Radiology' is a dict, not a list"), ({'Laboratory Tests': []}, "'Laboratory Tests' is a list, not a dict"),
    ({'ICD Diagnosis': 'Acute pancreatitis'}, "'ICD Diagnosis' is a str, not a list"), ({'Radiology': ['x']}, "without a key 'Report'"), ({'Laboratory Tests': {'x': '5'}}, "'x' is no identifier"),
    ({'Physical Examination': True}, 'a bool where text should be'), ({'Laboratory Tests': {1.5: '5'}}, "'1.5' is no identifier")])
def test_wrong_kinds_are_named(tmp_path, changes, why):
    with pytest.raises(TableError, match=re.escape(why)): case(tmp_path, **changes)

def test_pathology_file_that_is_no_dict(tmp_path):
    (files(tmp_path)/'cholecystitis_hadm_info_first_diag.pkl').write_bytes(pickle.dumps([1]))
    with pytest.raises(TableError, match='cholecystitis.*no dict of admissions'): read_cases(tmp_path)
    files(tmp_path, cholecystitis={20000001: 'x'})
    with pytest.raises(TableError, match='a record is no dict'): read_cases(tmp_path)

def test_missing_file_is_named(tmp_path):
    (files(tmp_path)/'diverticulitis_hadm_info_first_diag.pkl').unlink()
    with pytest.raises(TableError, match='diverticulitis_hadm_info_first_diag.pkl: it is not in'): read_cases(tmp_path)
    (tmp_path/'lab_test_mapping.csv').unlink()
    with pytest.raises(TableError, match='lab_test_mapping.csv: it is not in'): read_cases(tmp_path)

def test_names_from_a_pickled_frame_are_refused_with_the_remedy(tmp_path):
    files(tmp_path, mapping='')
    pd.DataFrame(dict(itemid=[50956], label=['Lipase'])).to_pickle(tmp_path/'lab_test_mapping.pkl')
    with pytest.raises(TableError, match='lab_test_mapping.pkl: it holds more than plain values.*nothing of it was run.*CSV files of the release'): read_cases(tmp_path)
    (tmp_path/'lab_test_mapping.csv').write_text(NAMES) # as the remedy says
    assert read_cases(tmp_path)[0] == []

def test_names_from_plain_dicts(tmp_path):
    files(tmp_path, mapping='', pancreatitis={20000001: record()})
    (tmp_path/'lab_test_mapping.pkl').write_bytes(pickle.dumps({50956: 'Lipase', 51492: 'Protein'}))
    (tmp_path/'microbiology_test_mapping.pkl').write_bytes(pickle.dumps({90039: 'Urine, cultured'}))
    assert '- Urine, cultured: NO GROWTH.' in read_cases(tmp_path)[0][0].cultures

def test_column_missing_in_the_names(tmp_path):
    with pytest.raises(TableError, match='lab_test_mapping.csv, column label'): read_cases(files(tmp_path, mapping='itemid,name\n1,x\n'))

def test_mixed_encodings(tmp_path):
    one, counts = case(tmp_path, **{'Patient History': 'café'.encode(), 'Physical Examination': 'naïve'.encode('cp1252'), b'ICD Diagnosis'.decode(): ['Ménière'.encode('cp1252'), 'half \ud800']})
    assert (one.history, one.exam, one.titles) == ('café', 'naïve', ['Ménière', 'half ?']) and counts['texts not in UTF-8'] == 2

def test_text_of_python_2(tmp_path):
    "Python 2 wrote text as bytes; so did its keys."
    old = b'\x80\x02}(' + b''.join(b'U' + bytes([len(k)]) + k.encode() + v for k, v in {
        'Patient History': b'U\x05caf\xc3\xa9', 'Physical Examination': b'U\x04caf\xe9', 'Laboratory Tests': b'}', 'Reference Range Lower': b'}', 'Reference Range Upper': b'}',
        'Radiology': b']', 'ICD Diagnosis': b']U\x09Gastritisa'}.items()) + b'u.'
    files(tmp_path)
    (tmp_path/'appendicitis_hadm_info_first_diag.pkl').write_bytes(b'\x80\x02}J\x81\x2e\x31\x01' + old[2:-1] + b's.')
    (one,), counts = read_cases(tmp_path)
    assert (one.history, one.exam, one.titles, one.subject_id) == ('café', 'café', ['Gastritis'], None) and counts['texts not in UTF-8'] == 1

@pytest.mark.parametrize('nothing', ['', ' \n', None, float('nan')])
def test_empty_notes(tmp_path, nothing):
    one, counts = case(tmp_path, **{'Patient History': nothing, 'Physical Examination': nothing})
    assert one.history == one.exam == '' and counts['without history'] == counts['without exam'] == 1
    assert all('History' not in part and 'examination' not in part for part in context_of(one))

def test_what_cannot_be_asked_is_left_out_and_counted(tmp_path):
    nothing = dict.fromkeys(('Patient History', 'Physical Examination'), '') | {'Laboratory Tests': {}, 'Microbiology': {}, 'Radiology': []}
    files(tmp_path, appendicitis={1: record(**nothing), 2: record(titles=()), 3: record(titles=('', float('nan'))), 4: record(subject=7)}, cholecystitis={4: record(subject=7), 5: record(subject=7)})
    cases, counts = read_cases(tmp_path)
    assert [c.hadm_id for c in cases] == [5]
    assert (counts['left out: empty'], counts['left out: no ICD title'], counts['left out: admission stands twice']) == (1, 2, 2)

def test_admission_twice_in_one_file(tmp_path):
    files(tmp_path, appendicitis={20000001: record(), '20000001': record(), 20000002.0: record()})
    cases, counts = read_cases(tmp_path)
    assert [c.hadm_id for c in cases] == [20000002] and counts['left out: admission stands twice'] == 2

def test_a_patient_twice_is_one_patient(tmp_path):
    questions, counts = cdm_questions(files(tmp_path, appendicitis={1: record(subject=7), 2: record(subject=7)}, pancreatitis={3: record(Radiology=[])}), SMOKE)
    assert dict(questions.select('sample_id', 'group').rows()) == {'1': '7', '2': '7', '3': 'admission 3'} and counts['patients'] == 2 and counts['patient unknown'] == 1

def test_notes_of_two_patients_in_one_record(tmp_path):
    with pytest.raises(TableError, match='row 1: its radiology notes are of two patients'): case(tmp_path, Radiology=[{'Note ID': f'{i}-RR-1', 'Report': 'x'} for i in (1, 2)])

# -- the CSV release

def release(folder, ids=None):
    rows = dict(history_of_present_illness='hadm_id,hpi\n20000001,"Pain  in the\nepigastrium."\n', physical_examination='hadm_id,pe\n20000001,ABD: tender\n',
                laboratory_tests='hadm_id,itemid,valuestr,ref_range_lower,ref_range_upper\n20000001,50956,900.0 IU/L,0.0,60.0\n20000001,51492.0,NEG,,\n20000001,7,5,,\n',
                microbiology='hadm_id,test_itemid,valuestr,spec_itemid\n20000001,90039,NO GROWTH.,70079\n',
                radiology_reports='hadm_id,note_id,modality,region,exam_name,text\n20000001,10000001-RR-3,CT,Abdomen,CT ABD,"FINDINGS:\n\n ____ with stranding \n\n"\n',
                icd_diagnosis='hadm_id,icd_diagnosis\n20000001,Acute pancreatitis\n', lab_test_mapping=NAMES)
    for stem, text in rows.items(): (folder/f'{stem}.csv').write_text(text)
    (folder/'pathology_ids.json').write_text(json.dumps(ids or {d: [20000001]*(d == 'pancreatitis') for d in DISEASES}))
    return folder

def test_both_layouts_say_the_same(tmp_path):
    for name in 'ab': (tmp_path/name).mkdir()
    assert read_cases(release(tmp_path/'a')) == read_cases(files(tmp_path/'b', pancreatitis={20000001: record()}))
    assert 'pathology_ids.json' in BENCHMARK.files(tmp_path/'a') and len(BENCHMARK.files(tmp_path/'b')) == 5

def test_release_with_a_missing_column(tmp_path):
    (release(tmp_path)/'laboratory_tests.csv').write_text('hadm_id,itemid,value\n1,2,3\n')
    with pytest.raises(TableError, match='laboratory_tests.csv, column valuestr'): read_cases(tmp_path)

def test_release_in_another_encoding(tmp_path):
    (release(tmp_path)/'physical_examination.csv').write_bytes('hadm_id,pe\n20000001,naïve\n'.encode('cp1252'))
    with pytest.raises(TableError, match='physical_examination.csv: line 2 is not UTF-8'): read_cases(tmp_path)

def test_release_with_an_admission_twice(tmp_path):
    with open(release(tmp_path)/'history_of_present_illness.csv', 'a') as f: f.write('20000001,again\n')
    with pytest.raises(TableError, match='history_of_present_illness.csv, row 2: an admission stands there twice'): read_cases(tmp_path)

@pytest.mark.parametrize('text', ['{', '[]', '{"appendicitis": []}', '{"appendicitis": 1, "cholecystitis": [], "diverticulitis": [], "pancreatitis": []}',
                                  '{"appendicitis": [[1]], "cholecystitis": [], "diverticulitis": [], "pancreatitis": []}', '['*100_000])
def test_release_with_bad_lists(tmp_path, text):
    (release(tmp_path)/'pathology_ids.json').write_text(text)
    with pytest.raises(TableError, match='pathology_ids.json'): read_cases(tmp_path)

def test_release_without_a_record_or_a_file(tmp_path):
    release(tmp_path, {d: [20000009] for d in DISEASES})
    with pytest.raises(TableError, match="row 1: no key 'Patient History'"): read_cases(tmp_path)
    (tmp_path/'microbiology.csv').unlink()
    with pytest.raises(TableError, match='microbiology.csv: it is not in'): read_cases(tmp_path)

# -- names

@pytest.mark.parametrize('line, found', [
    ('Unspecified acute appendicitis', 'a'), ('ACUTE APPENDICITIS', 'a'), ('Acute appendicitis with perforation', 'a'), ('ruptured appendix', 'a'), ('Appendiceal abscess', 'a'), ('apendicitis', 'a'), ('Acquired absence of appendix', ''),
    ('Acute appendicitis without mention of peritonitis', 'a'), ('appendectomy', ''), ('Malignant neoplasm of appendix', ''),
    ('Calculus of gallbladder with acute cholecystitis without obstruction', 'c'), ('Calculus of gallbladder without cholecystitis without obstruction', ''),
    ('Calculus of gallbladder with acute cholecystitis, without mention of obstruction', 'c'), ('Calculus of gallbladder without mention of cholecystitis, without mention of obstruction', ''),
    ('Gangrene of gallbladder in cholecystitis', 'c'), ('Perforation of gall bladder', 'c'), ('Cholangitis', ''), ('Calculus of gallbladder', ''),
    ('Diverticulitis of large intestine with perforation and abscess without bleeding', 'd'), ('Diverticulitis of colon (without mention of hemorrhage)', 'd'),
    ('Diverticulosis of large intestine without perforation or abscess without bleeding', ''), ('Diverticular abscess', 'd'), ('Diverticulosis of colon with hemorrhage', ''), ('diverticullitis', 'd'),
    ('Acute pancreatitis without necrosis or infection, unspecified', 'p'), ('Gallstone pancreatitis', 'p'), ('Infected pancreatic necrosis', 'p'), ('Pancreatic cancer', ''), ('Chronic hepatitis', ''),
    ('Acute pancreatitis and cholecystitis', 'cp'), ('No appendicitis, acute pancreatitis', 'p'), ('', '')])
def test_names(line, found): assert ''.join(d[0] for d in named_diseases([line])) == found

# -- scores

def ask(*rows):
    return pl.DataFrame([dict(sample_id=str(i), group=g, task=d, split='held_out', kind='decision', context=['x'], question=QUESTION, gold=gold) for i, (g, d, gold) in enumerate(rows)], schema=QUESTIONS)
def say(*texts): return pl.DataFrame([dict(sample_id=str(i), text=t, status='answered') for i, t in enumerate(texts) if t != 'not asked'], schema=ANSWERS)
def value(table, metric, task='overall', column='value'): return table.filter((pl.col('metric') == metric) & (pl.col('task') == task))[column].item()

def test_scores_by_hand():
    q = ask(('1', 'appendicitis', ['Acute appendicitis', 'Hypokalemia']), ('1', 'pancreatitis', ['Acute pancreatitis']), ('2', 'cholecystitis', ['Cholecystitis']), ('3', 'diverticulitis', ['Diverticulitis']))
    t = cdm_score(q, {'s': say('<think>pancreatitis</think>acute appendicitis\nAnemia\n', 'Acute pancreatitis\nCholecystitis', None, 'not asked')}, SMOKE)
    assert value(t, 'accuracy') == 2/3 and value(t, 'only') == 1/3
    assert value(t, 'f1', 'appendicitis') == 2*1/(2 + 2) and value(t, 'f1', 'pancreatitis') == 2*1/(1 + 2) and value(t, 'f1', 'cholecystitis') == 0
    assert value(t, 'f1') == pytest.approx((.5 + 2/3 + 0)/3) and value(t, 'f1', column='missing') == 1 and value(t, 'f1', column='groups') == 2
    assert value(t, 'f1', 'diverticulitis') is None and value(t, 'f1', 'diverticulitis', 'samples') == 0 and '3 of 4' in t['note'][0]

def test_an_unclosed_chain_is_no_answer():
    t = cdm_score(ask(('1', 'appendicitis', ['Acute appendicitis'])), {'s': say('<think>Acute appendicitis')}, SMOKE)
    assert value(t, 'accuracy') == value(t, 'f1') == 0 and value(t, 'f1', column='missing') == 1

def test_naming_all_four_is_seen_through():
    t = cdm_score(ask(*((str(i), d, [f'Acute {d}']) for i, d in enumerate(DISEASES))), {'s': say(*['\n'.join(DISEASES)]*4)}, SMOKE)
    assert value(t, 'accuracy') == 1 and value(t, 'only') == 0

@quick
@given(st.lists(st.tuples(st.sets(st.sampled_from('abcdef'), min_size=1), st.sets(st.sampled_from('abcdefgh'), min_size=1), st.sampled_from(DISEASES), st.sampled_from(DISEASES)), min_size=1, max_size=12))
def test_scores_agree_with_scikit_learn(rows):
    q = ask(*((str(i), d, sorted(g)) for i, (g, _, d, _) in enumerate(rows)))
    t = cdm_score(q, {'titles': say(*('\n'.join(sorted(a)) for _, a, _, _ in rows)), 'diseases': say(*(f'Acute {a}' for *_, a in rows))}, profile('smoke', replicates=2))
    bits = MultiLabelBinarizer(classes=list('abcdefgh'))
    assert value(t.filter(pl.col('system') == 'titles'), 'f1') == pytest.approx(f1_score(bits.fit_transform([r[0] for r in rows]), bits.transform([r[1] for r in rows]), average='samples'))
    right = accuracy_score([r[2] for r in rows], [r[3] for r in rows])
    for metric in ('accuracy', 'only'): assert value(t.filter(pl.col('system') == 'diseases'), metric) == pytest.approx(right)

def test_intervals_draw_patients():
    "Forty answers of four patients are four things known, not forty."
    many = [(str(i), 'appendicitis', ['Acute appendicitis']) for i in range(40)]
    few = [(str(i % 4), d, g) for i, (_, d, g) in enumerate(many)]
    texts = ['Acute appendicitis' if i % 4 < 2 else 'Anemia' for i in range(40)]
    wide = [(value(t, 'accuracy', column='high') - value(t, 'accuracy', column='low')) for t in (cdm_score(ask(*r), {'s': say(*texts)}, profile('smoke')) for r in (many, few))]
    assert wide[0] < .4 < wide[1]

# -- baselines

def world(n=60):
    words = dict(appendicitis='right lower quadrant', cholecystitis='murphy sign', diverticulitis='left lower quadrant', pancreatitis='pain goes to the back')
    rows = []
    for i in range(n):
        d = DISEASES[(0, 0, 1, 2, 3)[i % 5]]
        rows.append(dict(sample_id=f'{i:03}', group=str(i), task=d, split='train' if i % 3 == 0 else 'held_out', kind='decision', context=[f'## History\n{words[d]} for {i} days'], question=QUESTION,
                         gold=[f'Acute {d}', 'Hypertension']))
    return pl.DataFrame(rows, schema=QUESTIONS)

def test_baselines():
    q = world()
    said = cdm_baselines(None, SMOKE, q)
    held = q.filter(pl.col('split') == 'held_out')
    assert set(said) == {'majority', 'frequency', 'keywords', 'logistic'} and all(sorted(a['sample_id']) == sorted(held['sample_id']) for a in said.values())
    t = cdm_score(q, said, SMOKE)
    for s in ('keywords', 'logistic'): assert value(t.filter(pl.col('system') == s), 'accuracy') == value(t.filter(pl.col('system') == s), 'f1') == 1
    assert value(t.filter(pl.col('system') == 'majority'), 'accuracy') == (held['task'] == 'appendicitis').mean()
    assert set(said['majority']['text']) == {'Hypertension\nAcute appendicitis'} or set(said['majority']['text']) == {'Acute appendicitis\nHypertension'}

def test_baselines_do_not_depend_on_the_order_of_the_questions():
    q = world(20)
    for s, a in cdm_baselines(None, SMOKE, q).items(): assert a.equals(cdm_baselines(None, SMOKE, q.reverse())[s]), s

def test_no_baseline_sees_the_answers_of_the_patients_it_answers_for():
    q, who = world(20), '001'
    changed = q.with_columns(gold=pl.when(pl.col('sample_id') == who).then(pl.lit(['Plague'], pl.List(pl.String))).otherwise('gold'),
                             task=pl.when(pl.col('sample_id') == who).then(pl.lit('pancreatitis')).otherwise('task'))
    before, after = (cdm_baselines(None, SMOKE, x) for x in (q, changed))
    for s in before: assert before[s].filter(pl.col('sample_id') == who).equals(after[s].filter(pl.col('sample_id') == who)), s

def test_few_cases_are_no_fault():
    assert all(len(a) == 0 for a in cdm_baselines(None, SMOKE, world(0)).values()) and by_words(['x'], ['appendicitis'], ['y', 'z']) == ['appendicitis']*2
    assert best_titles([]) == [] and len(cdm_score(world(0), cdm_baselines(None, SMOKE, world(0)), SMOKE)) == 4*5*3
    one = world(2)
    assert set(cdm_score(one, cdm_baselines(None, SMOKE, one), SMOKE)['samples']) == {0, 1}

# -- patients of a run

def fake_run(root, source, seen, stays):
    "What `patients_seen` reads of a run: patients of EHR-Ins, and admissions by patient."
    run = Run('r', root)
    for folder in (run.trajectories, run.samples/'ehr_ins', run.samples/'ehr_bench', run.checkpoints): folder.mkdir(parents=True)
    pl.DataFrame([dict(subject_id=s, table='admissions', hadm_id=h) for s, h in stays], schema=STORE).write_parquet(run.trajectories/'shard-00000.parquet')
    pl.DataFrame([dict(subject_id=s, split='train') for s in seen], schema=SAMPLES).write_parquet(run.samples/'ehr_ins'/'shard-00000.parquet')
    for folder, counts in ((run.trajectories, dict(source=source, access='open')), (run.samples, {})): (folder/'manifest.json').write_text(json.dumps(dict(key='k', counts=counts, params={})))
    return run

def cohort(folder):
    return files(folder, appendicitis={101: record(subject=1), 102: record(subject=2)}, pancreatitis={103: record(subject=3), 104: record(Radiology=[]), 105: record(Radiology=[])})

def test_patients_of_training_are_left_out_and_counted(tmp_path):
    (tmp_path/'c').mkdir(); run = fake_run(tmp_path, '3.1', {1, 4}, [(1, 900), (4, 104), (4, 901), (2, 102)])
    q, counts = for_run(run, cohort(tmp_path/'c')).questions(tmp_path/'c', SMOKE)
    assert dict(q.select('sample_id', 'split').rows()) == {'101': 'train', '102': 'held_out', '103': 'held_out', '104': 'train', '105': 'held_out'}
    assert counts['seen in training'] == 2 and counts['held out'] == 3 and counts['access'] == 'credentialed'
    assert set(asked_questions(q, SMOKE)['sample_id']) == {'102', '103', '105'}
    assert all(set(a['sample_id']) == {'102', '103', '105'} for a in cdm_baselines(None, SMOKE, q).values())

@pytest.mark.parametrize('source, licence, none', [('synthetic', '', True), ('3.1', 'Synthetic data', True), ('synthetic', 'Synthetic data', False), ('3.1', '', False)])
def test_numbers_of_two_worlds_are_not_compared(tmp_path, source, licence, none):
    (tmp_path/'c').mkdir(); run = fake_run(tmp_path, source, {1}, [(1, 101)])
    cohort(tmp_path/'c')
    if licence: (tmp_path/'c'/'LICENSE.txt').write_text(licence)
    assert (patients_seen(run, tmp_path/'c') is None) == none
    assert (for_run(run, tmp_path/'c').questions(tmp_path/'c', SMOKE)[1]['seen in training'] is None) == none
    assert for_run(run, tmp_path/'c').open == bool(licence)

# -- files of nobody, and the whole way

@pytest.fixture(scope='module')
def hospital(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world')/'runs'/'r'/'hospital'
    folder.mkdir(parents=True)
    build_hospital(folder/'tables', 150, 3, workers=1, progress=False)
    (folder/'manifest.json').write_text(json.dumps(dict(key='h')))
    return folder/'tables'

@pytest.fixture(scope='module')
def made(hospital, tmp_path_factory):
    folder = tmp_path_factory.mktemp('made')
    return folder, write_cases(open_source(hospital), folder)

def test_files_are_in_the_published_layout(made):
    folder, counts = made
    assert sum(counts[d] for d in DISEASES) > 5 and made_up(folder)
    for d in DISEASES:
        file = folder/f'{d}_hadm_info_first_diag.pkl'
        found = pickle.loads(file.read_bytes()) # our own file
        assert repr(found) == repr(read_plain(file)) and len(found) == counts[d]
        for h, r in found.items():
            assert type(h) is int and set(NEEDED) < set(r) and r['Laboratory Tests'] and set(r['Laboratory Tests']) == set(r['Reference Range Lower']) == set(r['Reference Range Upper'])
            assert d in r['ICD Diagnosis'][0].lower() and all(not re.search(d, r[k], re.I) for k in NEEDED[:2])
            assert any(x['Region'] == 'Abdomen' for x in r['Radiology']) and all(set(x) == {'Note ID', 'Modality', 'Region', 'Exam Name', 'Report'} for x in r['Radiology'])
            assert all(not re.search(f'{d}|IMPRESSION|INDICATION', x['Report'], re.I) and 'FINDINGS:\n' in x['Report'] for x in r['Radiology'])

def test_the_first_result_of_a_test_is_the_one_shown(made, hospital):
    folder, _ = made
    labs = open_source(hospital).scan('labevents').filter(pl.col('hadm_id').is_not_null()).sort('charttime', 'labevent_id').collect()
    for c in read_cases(folder)[0][:3]:
        mine = labs.filter(pl.col('hadm_id') == c.hadm_id).unique('itemid', keep='first', maintain_order=True)
        assert len(c.labs) == len(mine)
        found = read_plain(folder/f'{c.disease}_hadm_info_first_diag.pkl')[c.hadm_id]['Laboratory Tests']
        for i, x, unit in mine.select('itemid', 'valuenum', 'valueuom').rows():
            if x is not None: assert found[i] == ' '.join(filter(None, (str(x), unit)))

def test_only_a_synthetic_hospital_makes_files(tmp_path, hospital):
    source = open_source(hospital)
    source.__dict__['version'] = '3.1'
    with pytest.raises(TableError, match='it is no synthetic hospital'): write_cases(source, tmp_path)
    assert not list(tmp_path.iterdir())

def test_from_hospital_to_scores(hospital, monkeypatch):
    root = hospital.parents[3]
    run = Run('r', root)
    folder = build_cases(run)
    cases = read_cases(folder)[0]
    fake_run(root, 'synthetic', {c.subject_id for c in cases[::2]}, [(c.subject_id, c.hadm_id) for c in cases])
    assert build_cases(run) == folder and build_benchmark(run, SMOKE, for_run(run, folder), folder)
    assert not build_benchmark(run, SMOKE, for_run(run, folder), folder) # up to date
    out = run.folder/'transfer'/'mimic_cdm'
    counts, results = read_manifest(out)['counts'], pl.read_parquet(out/'results.parquet')
    assert counts['access'] == 'open' and 0 < counts['seen in training'] < len(cases) and counts['systems'] == ['frequency', 'keywords', 'logistic', 'majority']
    assert value(results.filter(pl.col('system') == 'keywords'), 'accuracy', column='samples') == counts['held out'] == counts['asked']
    assert value(results.filter(pl.col('system') == 'keywords'), 'accuracy') > value(results.filter(pl.col('system') == 'majority'), 'accuracy')
