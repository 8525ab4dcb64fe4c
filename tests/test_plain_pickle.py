"""Pickles as plain data: values come back, whatever else is in a file is refused, and nothing is ever run."""
import collections
import copyreg
import datetime
import io
import os
import pickle
import pickletools
import re
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ehr_r1.transfer.mimic_cdm.plain_pickle as module
from ehr_r1.data.table_files import TableError
from ehr_r1.transfer.mimic_cdm.plain_pickle import read_plain

SHARED_FOLDER = [HealthCheck.function_scoped_fixture]  # each example writes its file anew
quick = settings(max_examples=15, deadline=None, suppress_health_check=SHARED_FOLDER)
thorough = settings(max_examples=100, deadline=None, suppress_health_check=SHARED_FOLDER)


def read_bytes(folder, data):
    "What `read_plain` makes of a file with these bytes."
    (folder/'x.pkl').write_bytes(data)
    return read_plain(folder/'x.pkl')


def refused(folder, data, why):
    with pytest.raises(TableError, match=why):
        read_bytes(folder, data)


# -- plain values

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-2**63, 2**63 - 1), st.floats(allow_nan=False), st.text(max_size=20))
keys = st.integers(-2**31, 2**40) | st.text(max_size=8)


def containers(inner):
    lists = st.lists(inner, max_size=4)
    return lists | lists.map(tuple) | st.dictionaries(keys, inner, max_size=3)


plain = st.recursive(scalars, containers, max_leaves=12)


def with_types(value):
    "The value with the type of everything in it: 1, 1.0 and True are equal."
    if isinstance(value, dict):
        return dict, [(with_types(key), with_types(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [with_types(item) for item in value]
    return type(value), repr(value)


@quick
@given(value=plain)
def test_plain_values_come_back(tmp_path, value):
    for protocol in range(6):
        found = read_bytes(tmp_path, pickle.dumps(value, protocol))
        assert with_types(found) == with_types(value), protocol


@pytest.mark.parametrize('protocol', [3, 4, 5])
@pytest.mark.parametrize('value', [
    {b'key': [b'', b'x'*300, b'y'*70_000]},
    'ä'*70_000,
    list(range(3_000)),
    {i: str(i % 7) for i in range(3_000)},
], ids=['bytes', 'text', 'list', 'dict'])
def test_bytes_and_long_values_come_back(tmp_path, protocol, value):
    assert read_bytes(tmp_path, pickle.dumps(value, protocol)) == value


def test_missing_file_says_so(tmp_path):
    with pytest.raises(TableError, match='x.pkl: it is not in'):
        read_plain(tmp_path/'x.pkl')


# -- hostile pickles

class Calls:
    "Asks the loader to call a function."

    def __init__(self, function, *arguments, **more):
        self.answer = (function, arguments, *more.values())

    def __reduce_ex__(self, protocol):
        return self.answer


class Armed:
    "Makes a file when its state is set."

    def __setstate__(self, state):
        open(state['path'], 'w').close()

    def __getstate__(self):
        return {'path': os.environ['CAUGHT']}


class Stored(pickle.Pickler):
    "Keeps a text elsewhere."

    def persistent_id(self, value):
        return 'elsewhere' if value == 'held' else None


def touch(path):
    return Calls(os.system, f'touch {path}')


def in_a_record(path):
    return {20000001: {'Patient History': 'Pain.', 'Radiology': [{'Report': touch(path)}]}}


def dumped(make):
    "A function that gives, for a path, the pickles of what `make` gives, in every protocol."
    return lambda path: [pickle.dumps(make(path), protocol) for protocol in range(6)]


def raw(*data):
    "A function that gives, for a path, these bytes with it."
    return lambda path: [some.replace(b'PATH', os.fsencode(path)) for some in data]


def stored_elsewhere(path):
    pickles = []
    for protocol in range(6):
        out = io.BytesIO()
        Stored(out, protocol).dump(['held'])
        pickles.append(out.getvalue())
    return pickles


HOSTILE = {  # what it does -> path of a file that must not appear -> pickles
    'system': dumped(touch),
    'inside_a_record': dumped(in_a_record),
    'as_a_key': dumped(lambda path: {touch(path): 1}),
    'evaluated': dumped(lambda path: Calls(eval, f'open({str(path)!r}, "w")')),
    'executed': dumped(lambda path: Calls(exec, f'open({str(path)!r}, "w")')),
    'opened': dumped(lambda path: Calls(open, str(path), 'w')),
    'nested': dumped(lambda path: Calls(getattr, Calls(__import__, 'os'), 'system')),
    'nested_call': dumped(lambda path: Calls(map, os.system, [f'touch {path}'])),
    'setstate': dumped(lambda path: Armed()),
    'state_of_a_call': dumped(lambda path: Calls(Armed, state={'path': str(path)})),
    'items_of_a_call': dumped(lambda path: Calls(list, state=None, items=iter(['x']))),
    'instance': raw(b"(S'touch PATH'\nios\nsystem\n."),
    'object': raw(b"(cos\nsystem\nS'touch PATH'\no."),
    'old_global': raw(b"cos\nsystem\n(S'touch PATH'\ntR.", b"cos\nsystem\n."),
    'new_object': raw(b"\x80\x02cbuiltins\nobject\n)\x81.", b"\x80\x04cbuiltins\nobject\n)}\x92."),
    'stack_global': raw(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x05touch\x85R."),
    'built': raw(b"\x80\x02}}b.", b"\x80\x02]}b."),
    'persistent': stored_elsewhere,
    'extension': raw(b'\x80\x02\x82\xf0.', b'\x80\x02\x83\xf0\x00.', b'\x80\x02\x84\xf0\x00\x00\x00.'),
    'buffers': raw(b'\x80\x05\x97.', b'\x80\x05\x8c\x01a\x98.', b'\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00a.'),
    'sets': dumped(lambda path: {1, 2}),
    'frozen_sets': dumped(lambda path: frozenset('a')),
    'dates': dumped(lambda path: {'a': datetime.datetime(2100, 1, 1)}),
    'numpy_numbers': dumped(lambda path: {np.int64(7): np.float64(.5)}),
    'arrays': dumped(lambda path: np.arange(3)),
    'frames': dumped(lambda path: pd.DataFrame(dict(itemid=[1]))),
    'ordered': dumped(lambda path: collections.OrderedDict(a=1)),
    'missing': dumped(lambda path: collections.defaultdict(list)),
    'complex_numbers': dumped(lambda path: 1j),
    'classes': dumped(lambda path: [str]),
    'functions': dumped(lambda path: len),
}
REFUSAL = (r'x\.pkl: it (holds more than plain values \(\w+ at byte [\d,]+\); nothing of it was run|is damaged)'
           r'.*CSV files')


@pytest.fixture
def caught(tmp_path, monkeypatch):
    "A file that appears when a hostile pickle is run."
    path = tmp_path/'caught'
    monkeypatch.setenv('CAUGHT', str(path))
    monkeypatch.setitem(copyreg._inverted_registry, 0xf0, ('os', 'system'))
    return path


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_pickle_is_refused_and_nothing_runs(tmp_path, caught, name):
    for number, data in enumerate(HOSTILE[name](caught)):
        refused(tmp_path, data, REFUSAL)
        assert not caught.exists(), (name, number)


ARMED = ['system', 'inside_a_record', 'evaluated', 'opened', 'setstate', 'instance', 'old_global']


@pytest.mark.parametrize('name', ARMED)
def test_the_hostile_pickles_are_armed(caught, name):
    "Python's own loader falls for them; otherwise the test above would show nothing."
    try:
        pickle.loads(HOSTILE[name](caught)[0])
    except Exception:
        pass
    assert caught.exists()


def test_every_instruction_that_is_not_plain_is_refused(tmp_path):
    "All that Python's pickles can say, one by one, with whatever argument it takes."
    found = set()
    for code in pickletools.opcodes:
        for argument in (b'', b'1\n', b'a\na\n', b"'a'\n", b'\x00'*9):
            data = b'\x80\x04(N' + code.code.encode('latin-1') + argument + b'.'
            try:
                read_bytes(tmp_path, data)
            except TableError as e:
                found |= {code.name} & set(re.findall(r'plain values \((\w+) at byte 4\)', str(e)))
    assert found == {
        'GLOBAL', 'STACK_GLOBAL', 'REDUCE', 'BUILD', 'INST', 'OBJ', 'NEWOBJ', 'NEWOBJ_EX', 'PERSID', 'BINPERSID',
        'EXT1', 'EXT2', 'EXT4', 'EMPTY_SET', 'ADDITEMS', 'FROZENSET', 'BYTEARRAY8', 'NEXT_BUFFER', 'READONLY_BUFFER',
        'DUP', 'POP', 'POP_MARK'}


# -- damaged pickles

HUGE = (2**62).to_bytes(8, 'little')
MALFORMED = [
    # containers in two places, or in themselves
    (b'\x80\x04]\x94h\x00a.', 'two places'),
    (b'\x80\x04}\x94\x8c\x01ah\x00s.', 'two places'),
    (b'\x80\x02]q\x00]q\x01(h\x00h\x00ee.', 'two places'),
    # numbers that are too long
    (b'\x80\x04\x8a\xff' + b'\x01'*255 + b'.', 'more than 64 bits'),
    (b'L' + b'9'*3_000 + b'L\n.', 'more than 64 bits'),
    (b'I' + b'9'*9_999 + b'\n.', 'damaged'),
    # keys and values
    (b'\x80\x04}(\x8c\x01aK\x01\x8c\x01aK\x02u.', 'stands twice'),
    (b'\x80\x04}]K\x01s.', 'neither text nor number'),
    (b'\x80\x04})K\x01s.', 'neither text nor number'),
    (b'\x80\x04}(K\x01u.', 'do not match'),
    (b'\x80\x04K\x01K\x02K\x03s.', 'do not match'),
    (b'\x80\x04K\x01K\x02a.', 'no list'),
    # no value, or several
    (b'\x80\x04]].', 'one value'),
    (b'\x80\x04(].', 'one value'),
    (b'\x80\x04].\x80\x04].', 'one value'),
    (b'\x80\x04.', 'one value'),
    (b'\x80\x04e.', 'damaged'),
    (b'\x80\x04h\x05.', 'damaged'),
    # cut off, or something else
    (b'', 'damaged'),
    (b'\x80\x04]', 'damaged'),
    (b'no pickle', 'damaged'),
    (b'\xff\xfe', 'damaged'),
    # lengths that are not there, or negative
    (b'\x80\x04\x8d' + HUGE + b'a.', 'damaged'),
    (b'\x80\x04\x8e' + HUGE + b'a.', 'damaged'),
    (b'\x80\x04\x8b\xff\xff\xff\x7fa.', 'damaged'),
    (b'\x80\x04\x8b\xff\xff\xff\xffa.', 'damaged'),
]


@pytest.mark.parametrize('data, why', MALFORMED)
def test_malformed_pickle_is_refused(tmp_path, data, why):
    refused(tmp_path, data, why)


def test_claims_of_size_cost_nothing(tmp_path):
    bombs = [
        b'\x80\x04\x95' + b'\xff'*7 + b'\x7fN.',                # a frame of 2**63 bytes
        b'\x80\x02Nr\xff\xff\xff\x7f.',                         # a memo index of 2**31
        b'Np2147483647\n.',
        b'\x80\x04\x8d' + (2**40).to_bytes(8, 'little') + b'a.',  # a text of 2**40 bytes
        b'\x80\x04\x8b\xff\xff\xff\x7fa.',                      # a number of 2**31 bytes
    ]
    tracemalloc.start()
    for data in bombs:
        try:
            assert read_bytes(tmp_path, data) is None
        except TableError:
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_text_that_unfolds_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'PICKLE_BYTES', 1_000)
    repeated = b'\x80\x04]\x94(' + b'\x8c\xff' + b'x'*255 + b'\x94' + b'h\x01'*4 + b'e.'
    refused(tmp_path, repeated, 'unfolds to more than 1,000 characters')


def test_size_of_a_file_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'PICKLE_BYTES', 1_000)
    refused(tmp_path, pickle.dumps('x'*2_000), 'more than 1,000 bytes')


def test_number_of_instructions_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'PICKLE_STEPS', 50)
    refused(tmp_path, pickle.dumps(list(range(100))), 'more than 50 instructions')


def test_deep_lists_are_read(tmp_path):
    value = read_bytes(tmp_path, b'\x80\x02' + b']'*30_000 + b'a'*29_999 + b'.')
    depth = 1
    while value:
        value = value.pop()
        depth += 1
    assert depth == 30_000


def test_a_deep_key_is_refused(tmp_path):
    "Hashing such a key can end the interpreter."
    refused(tmp_path, b'\x80\x02}N' + b'\x85'*30_000 + b'K\x01s.', 'neither text nor number')


def parts_of(value):
    "A value and everything in it."
    todo = [value]
    while todo:
        part = todo.pop()
        yield part
        if type(part) is dict:
            todo += [*part, *part.values()]
        elif type(part) in (list, tuple):
            todo += part


changed_byte = st.tuples(st.integers(0, 10**6), st.integers(0, 255))
junk_or_none = st.binary(max_size=30) | st.none()


@thorough
@given(plain, st.integers(0, 5), st.lists(changed_byte, max_size=4), junk_or_none)
def test_damage_gives_plain_values_or_a_clear_error(tmp_path, value, protocol, changes, junk):
    data = bytearray(pickle.dumps(value, protocol) if junk is None else junk)
    for at, byte in changes if data else ():
        data[at % len(data)] = byte
    try:
        found = read_bytes(tmp_path, data)
    except TableError:
        return
    harmless = {dict, list, tuple, str, bytes, int, float, bool, type(None)}
    assert {type(part) for part in parts_of(found)} <= harmless
