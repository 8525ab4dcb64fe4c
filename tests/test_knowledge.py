"Knowledge in RRF files: reading, compiling, shortest paths; the hospital's own terms."
import gzip
import shutil
from itertools import pairwise, product
from types import SimpleNamespace

import networkx as nx
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ehr_r1.data.rrf import CUI, RRF, write_rrf
from ehr_r1.hospital.conditions import LIBRARY, read_library
from ehr_r1.hospital.routines import affirmed
from ehr_r1.hospital.terms import hospital_terms, write_terms
from ehr_r1.synthesis import compiling
from ehr_r1.synthesis.compiling import LEFT_OUT, SPELT, compile_knowledge
from ehr_r1.synthesis.knowledge import Knowledge
from ehr_r1.synthesis.names import normal_form
from ehr_r1.synthesis.release_files import KnowledgeError, rrf_parts


def cui(i):
    return f'C{i:07d}'


def frame(rows, columns):
    schema = dict.fromkeys(columns.split(), pl.String)
    return pl.DataFrame(rows, orient='row', schema=schema)


def write_tables(folder, names, relations=(), kinds=()):
    "An RRF folder of (cui, name, source, code), all preferred, (cui1, relation, cui2, source) and (cui, tui, kind)."
    preferred = frame(names, 'cui name source code').with_columns(preferred=True)
    related = frame(relations, 'cui1 relation cui2 source')
    write_rrf(folder, preferred, related, frame(kinds, 'cui tui kind'))


def write_edges(folder, edges, n=None):
    "An RRF folder of concepts 0…n-1, the first a disease, and the relations given as (a, b) or (a, label, b)."
    named, relations = set(), []
    for first, *label, second in edges:
        named |= {first, second}
        relation = label[0] if label else 'may_treat'
        relations.append((cui(first), relation, cui(second), 'TEST'))
    n = n or 1 + max(named)
    names = [(cui(i), f'name {i}', 'TEST', str(i)) for i in range(n)]
    disease = (cui(0), 'T047', 'Disease')
    write_tables(folder, names, relations, [disease])


def compiled(folder, edges, n=None):
    write_edges(folder/'rrf', edges, n)
    return knowledge_of(folder/'rrf', folder/'k')


def name_line(
    cui='C0000001',
    text='Fever',
    lat='ENG',
    ts='P',
    stt='PF',
    pref='Y',
    sab='MSH',
    code='D1',
    suppress='N',
):
    "A line of MRCONSO.RRF."
    return f'{cui}|{lat}|{ts}|L1|{stt}|S1|{pref}|A1||||{sab}|MH|{code}|{text}|0|{suppress}|256|\n'


def relation_line(a='C0000001', b='C0000002', rel='RO', rela='', suppress='N'):
    "A line of MRREL.RRF."
    return f'{a}|A1|AUI|{rel}|{b}|A2|AUI|{rela}|R1||MSH|MSH||Y|{suppress}||\n'


FEVER = 'C0000001|T184|A2|Sign or Symptom|AT1||\n'
COLD = name_line('C0000002', 'Cold')


def write_lines(folder, names, relations='', kinds=FEVER):
    folder.mkdir(exist_ok=True)
    (folder/'MRCONSO.RRF').write_text(names)
    (folder/'MRREL.RRF').write_text(relations)
    (folder/'MRSTY.RRF').write_text(kinds)
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def knowledge_of(rrf, folder):
    "What is compiled from an RRF folder."
    compile_knowledge(rrf, folder)
    return Knowledge(folder)


# normal form

def normal_forms(*texts):
    forms = pl.select(normal_form(pl.lit(pl.Series(texts))))
    return forms.to_series().to_list()


@pytest.mark.parametrize('first, second', [
    ('Kidney diseases', 'Disease of the Kidney'),
    ("Crohn's disease", 'Crohn disease'),
    ('Crohn’s disease', 'CROHNS DISEASE'),
    ('Sjögren syndrome', 'sjogren-syndrome'),
    ('Pneumonia, unspecified', 'pneumonia NOS'),
    ('Fracture of femur', 'femur fracture'),
])
def test_spellings_of_a_name_have_one_form(first, second):
    one, other = normal_forms(first, second)
    assert one == other != ''


@pytest.mark.parametrize('first, second', [
    ('shock', 'no shock'),
    ('with sepsis', 'without sepsis'),
    ('infectious', 'non infectious'),
    ('type 1', 'type 2'),
    ('virus', 'viru'),
    ('abscess', 'absces'),
    ('iritis', 'iriti'),
])
def test_what_changes_the_meaning_stays(first, second):
    one, other = normal_forms(first, second)
    assert one != other


SHORT_TEXT = st.text(max_size=30)
SOME_TEXTS = st.lists(SHORT_TEXT, min_size=1, max_size=5)


@settings(deadline=None, max_examples=50)
@given(SOME_TEXTS)
def test_the_order_of_words_changes_no_form(texts):
    def turned(form):
        return ' '.join(reversed(form.split()))

    once = normal_forms(*texts)
    of_turned = normal_forms(*map(turned, once))
    assert of_turned == normal_forms(*once)


@settings(deadline=None, max_examples=50)
@given(SOME_TEXTS)
def test_a_form_is_sorted_words_between_single_spaces(texts):
    for form in normal_forms(*texts):
        words = form.split()
        assert form == ' '.join(words)
        assert words == sorted(words)


# reading

NAME, RELATION = name_line(), relation_line()
MORE_AFTER = r'MRCONSO.RRF, line 2: 18 fields ended by a \|, must be 18 with nothing after'
FIRST_LINE = {
    'MRCONSO.RRF': NAME,
    'MRREL.RRF': RELATION,
    'MRSTY.RRF': FEVER}


BROKEN = {
    'field too few': ('MRCONSO.RRF', NAME[:-5] + '\n', 'MRCONSO.RRF, line 2: 17 fields'),
    'field too many': ('MRCONSO.RRF', '|' + NAME, 'MRCONSO.RRF, line 2: 19 fields'),
    'text after the fields': ('MRCONSO.RRF', NAME.replace('|\n', '|x\n'), MORE_AFTER),
    'empty line': ('MRCONSO.RRF', '\n', 'line 2: 0 fields'),
    'short id': ('MRCONSO.RRF', name_line(cui='C12345'), "MRCONSO.RRF, line 2: 'C12345' is not a concept id"),
    'letter for a digit': ('MRCONSO.RRF', name_line(cui='C00000O1'), "line 2: 'C00000O1' is not"),
    'small letter': ('MRCONSO.RRF', name_line(cui='c0000001'), "line 2: 'c0000001' is not"),
    'no id': ('MRCONSO.RRF', name_line(cui=''), "line 2: '' is not"),
    'id without a letter': ('MRREL.RRF', relation_line(b='0000002'), "MRREL.RRF, line 2: '0000002' is not"),
    'relation too short': ('MRREL.RRF', RELATION.replace('|MSH', 'MSH', 1), 'MRREL.RRF, line 2: 15 fields'),
    'kind too short': ('MRSTY.RRF', 'C0000001|T184|\n', 'MRSTY.RRF, line 2: 2 fields'),
}


@pytest.mark.parametrize('file, line, says', BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_named_and_nothing_is_compiled(tmp_path, file, line, says):
    folder = write_lines(tmp_path/'rrf', NAME + COLD, RELATION)
    (folder/file).write_text(FIRST_LINE[file] + line)
    with pytest.raises(KnowledgeError, match=says):
        compile_knowledge(folder, tmp_path/'k')
    with pytest.raises(KnowledgeError, match='compile_knowledge'):
        Knowledge(tmp_path/'k')


@pytest.mark.parametrize('line, says', [
    (relation_line(a='X').encode(), 'line 501'),
    (relation_line(rela='caf\xe9').encode('latin-1'), 'line 501: not UTF-8'),
])
def test_the_line_is_right_in_later_parts_of_a_file(tmp_path, line, says):
    path = tmp_path/'MRREL.RRF'
    right = RELATION.encode()
    path.write_bytes(right*500 + line + right)
    with pytest.raises(KnowledgeError, match=says):
        list(rrf_parts(path, ('CUI1',), size=1000))


def test_parts_do_not_matter(tmp_path):
    path = tmp_path/'MRREL.RRF'
    labels = ['r' + 'é'*(i % 7) for i in range(300)]
    lines = [relation_line(a=cui(i), rela=label) for i, label in enumerate(labels)]
    path.write_text(''.join(lines))
    columns = ('CUI1', 'RELA')
    whole, = rrf_parts(path, columns)
    parts = pl.concat(rrf_parts(path, columns, size=123))
    assert parts.equals(whole)
    assert whole['CUI1'].to_list() == list(range(20_000_000, 20_000_300))


def test_quotes_windows_line_ends_and_a_missing_last_line_end(tmp_path):
    text = name_line(text='6" wound') + name_line('C0000002', '"quoted')
    of_windows = text.replace('\n', '\r\n').encode()
    folder = write_lines(tmp_path/'rrf', text)
    (folder/'MRCONSO.RRF').write_bytes(of_windows[:-2])
    names = knowledge_of(folder, tmp_path/'k').names.collect()
    assert names['name'].to_list() == ['6" wound', '"quoted']


@pytest.fixture
def gzipped(tmp_path):
    "A folder of plain files, and the same files with gzip in another."
    plain, packed = tmp_path/'plain', tmp_path/'gz'
    write_edges(plain, [(0, 1), (1, 2)])
    packed.mkdir()
    for name in RRF:
        content = (plain/name).read_bytes()
        (packed/f'{name}.gz').write_bytes(gzip.compress(content))
    return SimpleNamespace(plain=plain, packed=packed)


def test_gzip_gives_the_same_bytes(tmp_path, gzipped):
    compile_knowledge(gzipped.plain, tmp_path/'a')
    compile_knowledge(gzipped.packed, tmp_path/'b')
    assert files_of(tmp_path/'a') == files_of(tmp_path/'b')


def test_damaged_gzip_is_an_error(tmp_path, gzipped):
    broken = gzipped.packed/'MRREL.RRF.gz'
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(KnowledgeError, match='damaged gzip'):
        compile_knowledge(gzipped.packed, tmp_path/'k')


def test_a_missing_file_is_named(tmp_path):
    folder = write_lines(tmp_path/'rrf', name_line())
    (folder/'MRREL.RRF').unlink()
    with pytest.raises(KnowledgeError, match='MRREL.RRF: not in'):
        compile_knowledge(folder, tmp_path/'k')


@pytest.fixture
def umls_sample(shared):
    sample = shared/'data'/'umls-sample'
    if not sample.is_dir():
        pytest.skip('shared data missing: umls-sample')
    return sample


def test_the_public_sample_lines_of_umls(umls_sample, tmp_path):
    for name in ('MRCONSO.RRF', 'MRSTY.RRF'):
        shutil.copy(umls_sample/name, tmp_path/name)
    line = 'C0000005|A26634265|AUI|RB|C0000039|A0016515|AUI||R1||MSH|MSH||Y|N||\n'
    (tmp_path/'MRREL.RRF').write_text(line)
    k = knowledge_of(tmp_path, tmp_path/'k')
    path, = k.paths('C0000039', 'C0000005')
    assert k.name('C0000005') == '(131)I-Macroaggregated Albumin'
    assert k.kinds('C0000039') == ['Organic Chemical', 'Pharmacologic Substance']
    assert path.describe(k) == '1,2-Dipalmitoylphosphatidylcholine —broader than→ (131)I-Macroaggregated Albumin'


def test_the_layout_is_that_of_umls(umls_sample):
    lines = (umls_sample/'MRFILES.RRF').read_text().splitlines()
    layout = {}
    for line in lines:
        name, _, columns, *_ = line.split('|')
        layout[name] = tuple(columns.split(','))
    for name, columns in RRF.items():
        assert layout[name] == columns


# names

FALSE_MARKS = dict(ts='S', stt='VO', pref='N')
MANY_NAMES = ''.join([
    name_line(text='Fieber', lat='GER'),
    name_line(text='Pyrexia', ts='S'),
    name_line(text='Fever'),
    name_line(text='Old', suppress='O'),
    name_line(text='Fever', sab='ICD10CM', code='R50.9', ts='S'),
    name_line('C0000002', 'zeta', **FALSE_MARKS),
    name_line('C0000002', 'alpha', **FALSE_MARKS),
    name_line('C0000003', 'gone', suppress='Y')])


@pytest.fixture
def named(tmp_path):
    folder = write_lines(tmp_path/'rrf', MANY_NAMES)
    counts = compile_knowledge(folder, tmp_path/'k')
    knowledge = Knowledge(tmp_path/'k')
    names = knowledge.names.collect()
    return SimpleNamespace(knowledge=knowledge, counts=counts, names=names)


def test_the_preferred_name_is_the_marked_one_or_the_first_in_the_alphabet(named):
    assert named.knowledge.name('C0000001') == 'Fever'
    assert named.knowledge.name('C0000002') == 'alpha'


def test_one_name_of_a_concept_is_preferred(named):
    of_fever = named.names.filter(cui='C0000001')
    assert of_fever.select('name', 'source', 'code', 'preferred').rows() == [
        ('Fever', 'MSH', 'D1', True),
        ('Fever', 'ICD10CM', 'R50.9', False),
        ('Pyrexia', 'MSH', 'D1', False)]
    by_concept = named.names.group_by('cui').agg(pl.col('preferred').sum())
    assert by_concept['preferred'].to_list() == [1, 1]


def test_names_that_are_left_out_are_counted(named):
    assert 'C0000003' not in named.knowledge
    assert named.counts['names_read'] == 8
    assert named.counts['names_kept'] == 5
    assert named.counts['names_foreign'] == 1
    assert named.counts['names_suppressed'] == 2
    assert named.counts['concepts'] == 2


def test_no_english_name_is_an_error(tmp_path):
    folder = write_lines(tmp_path/'rrf', name_line(lat='SPA'))
    with pytest.raises(KnowledgeError, match='English'):
        compile_knowledge(folder, tmp_path/'k')


@pytest.mark.parametrize('wrong', ['C9999999', 'C1', '', 'fever', 'H0000000', None])
def test_unknown_concepts_have_no_paths(tmp_path, wrong):
    k = compiled(tmp_path, [(0, 1)])
    assert wrong not in k
    assert k.paths(wrong, cui(0)) == []
    assert k.paths(cui(0), wrong) == []


def test_an_unknown_concept_has_no_name(tmp_path):
    k = compiled(tmp_path, [(0, 1)])
    with pytest.raises(KnowledgeError, match='C9999999'):
        k.name('C9999999')


def test_kinds_of_concepts_with_and_without(tmp_path):
    k = compiled(tmp_path, [(0, 1)])
    assert k.kinds(cui(0)) == ['Disease']
    assert k.kinds(cui(1)) == []


def test_ids_of_several_letters(tmp_path):
    concepts = ('C0000001', 'C0000002', 'H0000001', 'Z9999999')
    names = ''.join(name_line(cui=concept, text=concept) for concept in concepts)
    named = relation_line(a='H0000001', b='Z9999999', rela='isa')
    unnamed = relation_line(a='B0000001')
    folder = write_lines(tmp_path/'rrf', names, named + unnamed)
    counts = compile_knowledge(folder, tmp_path/'k')
    k = Knowledge(tmp_path/'k')
    path, = k.paths('Z9999999', 'H0000001')
    assert path.describe(k) == 'Z9999999 —isa→ H0000001'
    assert counts['relations_unnamed'] == 1
    assert counts['edges'] == 2


# relations

def described(folder, relations):
    "The paths from one to two and back, as text."
    one, two = 'C0000001', 'C0000002'
    names = name_line(one, 'one') + name_line(two, 'two')
    rrf = write_lines(folder/'rrf', names, relations)
    k = knowledge_of(rrf, folder/'k')
    paths = k.paths(one, two) + k.paths(two, one)
    return [path.describe(k) for path in paths]


def test_a_relation_reads_from_the_second_concept_to_the_first(tmp_path):
    said = described(tmp_path, relation_line('C0000001', 'C0000002', rela='may_treat'))
    assert said == ['one ←may treat— two', 'two —may treat→ one']


def test_each_direction_has_its_own_label(tmp_path):
    back = relation_line('C0000002', 'C0000001', rela='may_be_treated_by')
    said = described(tmp_path, relation_line(rela='may_treat') + back)
    assert said == ['one —may be treated by→ two', 'two —may treat→ one']


@pytest.mark.parametrize('rel, label', [*SPELT.items(), ('ZZ', 'ZZ')])
def test_an_empty_rela_is_spelt_out(tmp_path, rel, label):
    _, back = described(tmp_path, relation_line(rel=rel))
    assert back == f'two —{label.replace("_", " ")}→ one'


LABELS = [
    relation_line(rel='RB'),
    relation_line(rela='b_label'),
    relation_line(rela='a_label'),
    relation_line('C0000002', 'C0000001', rel='RN')]


@pytest.mark.parametrize('lines', [LABELS, LABELS[::-1]])
def test_the_more_telling_label_stays(tmp_path, lines):
    assert described(tmp_path, ''.join(lines)) == ['one ←a label— two', 'two —a label→ one']


@pytest.mark.parametrize('left_out', [
    *(dict(rela=label) for label in LEFT_OUT),
    dict(rel='XR'),
    dict(rel='DEL'),
    dict(rela='isa', suppress='O'),
    dict(rela='isa', b='C0000001'),
])
def test_relations_that_are_left_out(tmp_path, left_out):
    line = relation_line(**left_out)
    alone = described(tmp_path, line)
    with_another = described(tmp_path, line + relation_line(rela='may_treat'))
    assert alone == []
    assert with_another[1] == 'two —may treat→ one'


def test_left_out_relations_shorten_no_path(tmp_path):
    k = compiled(tmp_path, [
        (0, 'has_contraindicated_drug', 2),
        (0, 'isa', 1),
        (1, 'isa', 2)])
    path, = k.paths(cui(0), cui(2))
    assert path.nodes == (cui(0), cui(1), cui(2))


# paths

TWELVE = [cui(i) for i in range(12)]
PLACES = st.integers(0, 11)
ENDS = st.lists(PLACES, min_size=2, max_size=2, unique=True).map(tuple)
EDGES = st.lists(ENDS, min_size=1, max_size=30)


def all_paths(knowledge, first, second, **limits):
    return knowledge.paths(first, second, max_paths=10**6, **limits)


few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(EDGES)
def test_all_shortest_paths_are_those_of_networkx(tmp_path, edges):
    k = compiled(tmp_path, edges, n=12)
    graph = nx.Graph([(cui(a), cui(b)) for a, b in edges])
    graph.add_nodes_from(TWELVE)
    for first, second in product(TWELVE, TWELVE):
        found = [path.nodes for path in all_paths(k, first, second, max_edges=12)]
        expected = []
        if first != second and nx.has_path(graph, first, second):
            expected = map(tuple, nx.all_shortest_paths(graph, first, second))
        assert sorted(found) == sorted(expected)


@few
@given(EDGES)
def test_arrows_point_as_relations_are_stated(tmp_path, edges):
    k = compiled(tmp_path, edges, n=12)
    stated = {(cui(a), cui(b)) for a, b in edges}
    for first, second in product(TWELVE, TWELVE):
        for path in all_paths(k, first, second, max_edges=12):
            assert set(path.relations) == {'may_treat'}
            for step, forward in zip(pairwise(path.nodes), path.forward):
                as_stated = step if forward else step[::-1]
                assert as_stated in stated


@pytest.fixture
def ladder(tmp_path):
    "Three times five concepts side by side between two hubs: 5³ shortest paths of six edges from 0 to 18."
    edges = []
    for hub in (0, 6, 12):
        next_hub = hub + 6
        for side in range(hub + 1, next_hub):
            edges += [(hub, side), (side, next_hub)]
    k = compiled(tmp_path, edges)

    def paths(**limits):
        return k.paths(cui(0), cui(18), **limits)

    return SimpleNamespace(paths=paths, every=paths(max_paths=10**6))


def test_every_shortest_path_is_found_once(ladder):
    assert len(ladder.every) == 125
    assert len(set(ladder.every)) == 125
    for path in ladder.every:
        assert len(path.nodes) == 7
        assert len(set(path.nodes)) == 7


@pytest.mark.parametrize('limits, n', [
    (dict(), 10),
    (dict(max_paths=1), 1),
    (dict(max_paths=0), 0),
    (dict(max_edges=6, max_paths=1), 1),
    (dict(max_edges=5), 0),
    (dict(max_nodes=3), 0),
    (dict(max_nodes=10**6, max_paths=10**6), 125),
])
def test_limits_give_the_first_paths(ladder, limits, n):
    assert ladder.paths(**limits) == ladder.every[:n]


def test_few_expansions_give_fewer_paths_but_never_longer_ones(tmp_path):
    first, near, far, last = [0], range(1, 6), range(6, 11), [11]
    edges = [*product(first, near), *product(near, far), *product(far, last)]
    k = compiled(tmp_path, edges)
    every = all_paths(k, cui(0), cui(11))
    assert len(every) == 25
    assert len(set(every)) == 25
    for most, n in enumerate([0, 0, 0, 5, 10, 15, 20, 25, 25]):
        found = all_paths(k, cui(0), cui(11), max_nodes=most)
        assert len(found) == n
        assert set(found) <= set(every)


def test_concepts_with_few_relations_come_first(tmp_path):
    by_one, by_two = [(0, 1), (1, 9)], [(0, 2), (2, 9)]
    more_of_one = [(1, i) for i in range(3, 9)]
    k = compiled(tmp_path, by_one + by_two + more_of_one)
    paths = k.paths(cui(0), cui(9))
    assert [path.nodes[1] for path in paths] == [cui(2), cui(1)]


# what changes nothing, and what stops

def random_edges(seed, concepts, n):
    rng = np.random.default_rng(seed)
    edges = rng.integers(0, concepts, (n, 2))
    return [(a, b) for a, b in edges.tolist() if a != b]


def test_the_order_of_lines_changes_nothing(tmp_path):
    rrf, mixed = tmp_path/'rrf', tmp_path/'mixed'
    write_edges(rrf, random_edges(7, 40, 120), n=40)
    mixed.mkdir()
    rng = np.random.default_rng(7)
    for name in RRF:
        lines = (rrf/name).read_text().splitlines(True)
        shuffled = rng.permutation(lines)
        (mixed/name).write_text(''.join(shuffled))
    compile_knowledge(rrf, tmp_path/'a')
    compile_knowledge(mixed, tmp_path/'b')
    assert files_of(tmp_path/'a') == files_of(tmp_path/'b')


def test_stacks_change_nothing(tmp_path, monkeypatch):
    write_edges(tmp_path/'rrf', random_edges(8, 60, 200), n=60)
    compile_knowledge(tmp_path/'rrf', tmp_path/'a')
    monkeypatch.setattr(compiling, 'STACK', 7)
    compile_knowledge(tmp_path/'rrf', tmp_path/'b')
    one, other = files_of(tmp_path/'a'), files_of(tmp_path/'b')
    names = pl.read_parquet(one.pop('names.parquet'))
    other_names = pl.read_parquet(other.pop('names.parquet'))
    assert other_names.equals(names)  # row groups differ
    assert other == one


def test_an_interrupted_compilation_is_not_mistaken_for_a_whole_one(tmp_path):
    k = compiled(tmp_path, [(0, 1)])
    assert k.paths(cui(0), cui(1))
    (tmp_path/'rrf'/'MRREL.RRF').write_text('broken\n')
    with pytest.raises(KnowledgeError):
        compile_knowledge(tmp_path/'rrf', tmp_path/'k')
    with pytest.raises(KnowledgeError, match='interrupted'):
        Knowledge(tmp_path/'k')


def write_one_name(folder, concept, name):
    write_tables(folder, [(concept, name, 'S', '1')])


@pytest.mark.parametrize('concept, name', [
    ('C0000001', 'a|b'),
    ('C0000001', 'a\nb'),
    ('C0000001', ' '),
    ('C0000001', None),
    ('C001', 'a'),
    (None, 'a'),
])
def test_write_rrf_refuses_what_the_layout_cannot_hold(tmp_path, concept, name):
    with pytest.raises(ValueError, match='row 0'):
        write_one_name(tmp_path, concept, name)


def test_write_rrf_keeps_accents_and_quotes(tmp_path):
    write_one_name(tmp_path, 'C0000001', 'é "x"')
    k = knowledge_of(tmp_path, tmp_path/'k')
    assert k.name('C0000001') == 'é "x"'


# the hospital's terms

@pytest.fixture(scope='module')
def library():
    return read_library()


@pytest.fixture(scope='module')
def hospital(tmp_path_factory):
    folder = tmp_path_factory.mktemp('terms')
    write_terms(folder/'rrf')
    knowledge = knowledge_of(folder/'rrf', folder/'k')
    names = knowledge.names.collect()
    concept = dict(names.select('name', 'cui').iter_rows())
    return SimpleNamespace(knowledge=knowledge, concept=concept, names=names)


def written_values(library):
    "Every value that the hospital can write."
    yield from library.labs['label']
    yield from library.items['label']
    for column in ('name', 'home', 'pyxis', 'atc_name'):
        yield from library.drugs[column]
    for specimen in library.specimens.values():
        yield specimen['test'][1]
    for code in (*library.diagnoses.values(), *library.procedures.values()):
        for column in ('title10', 'title9', 'ccs_name', 'ccs9_name'):
            yield code[column]
    for condition in library.conditions.values():
        yield from (condition['unit'], condition['icu_unit'], condition['service'])
        yield from condition['weigh']
        yield from (imaging[0] for imaging in condition['imaging'])


def test_every_value_that_the_hospital_can_write_has_a_concept(hospital, library):
    values = {value.strip() for value in written_values(library) if value}
    assert values - hospital.concept.keys() == set()


def test_no_name_leads_to_two_concepts(hospital):
    lower_case = pl.col('name').str.to_lowercase()
    concepts = hospital.names.group_by(lower_case).agg(pl.col('cui').n_unique())
    assert concepts['cui'].max() == 1


def facts_of(condition, library):
    "Names of what a condition leads to: drugs, laboratory tests, procedures, imaging."
    drug = dict(library.drugs.select('drug', 'name').iter_rows())
    lab = dict(library.labs.select('lab', 'label').iter_rows())
    procedure = {code: about['title10'] for code, about in library.procedures.items()}
    yield from (drug[name] for name in condition['drugs'])
    yield from (lab[name] for name in condition['labs'])
    yield from (procedure[code] for code in condition['procedures'])
    yield from (imaging[0] for imaging in condition['imaging'])


def relations_between(hospital, first, second):
    "The relations of the first of the shortest paths."
    paths = hospital.knowledge.paths(hospital.concept[first], hospital.concept[second], max_paths=1)
    assert paths, (first, second)
    return paths[0].relations


def test_facts_of_a_condition_reach_its_decisions_in_few_steps(hospital, library):
    lengths = []
    for condition in library.conditions.values():
        disease = library.diagnoses[condition['icd10']]['title10']
        for fact in facts_of(condition, library):
            relations = relations_between(hospital, fact, disease)
            lengths.append(len(relations))
    lengths = np.array(lengths)
    assert (lengths <= 4).mean() > .97
    assert (lengths == 1).mean() > .6


def test_a_drug_that_everyone_gets_has_no_claim_on_the_condition(hospital):
    relations = relations_between(hospital, 'Docusate Sodium', 'Unilateral primary osteoarthritis, right knee')
    assert len(relations) > 1


def test_a_drug_of_the_condition_has(hospital):
    relations = relations_between(hospital, 'Furosemide', 'Acute on chronic systolic heart failure')
    assert relations == ('may_treat',)


@pytest.mark.parametrize('one, relation, other', [
    ('Medical Intensive Care Unit (MICU)', 'calls_for', 'gas panel'),
    ('Sepsis of unknown source', 'may_diagnose', 'Blood Culture, Routine'),
    ('Furosemide', 'may_treat', 'Acute on chronic systolic heart failure'),
    ('CHEST (PA & LAT)', 'may_diagnose', 'Community acquired pneumonia'),
    ('Creatinine', 'raised_in', 'Acute kidney injury'),
    ('Hemoglobin', 'lowered_in', 'Upper gastrointestinal bleeding from a duodenal ulcer'),
    ('Acute on chronic systolic heart failure', 'has_manifestation', 'Pulmonary edema'),
    ('Chest pain', 'calls_for', 'troponin panel'),
    ('CMED', 'located_in', 'Coronary Care Unit (CCU)'),
    ('Arterial Line', 'calls_for', 'Arterial Line Dressing Change'),
    ('Invasive Ventilation', 'calls_for', 'PEEP set'),
    ('Medicine', 'calls_for', 'Heparin'),
])
def test_what_a_clinician_would_sign(hospital, one, relation, other):
    ends = hospital.concept[one], hospital.concept[other]
    paths = hospital.knowledge.paths(*ends, max_edges=1)
    assert [path.relations for path in paths] == [(relation,)]


def test_an_image_that_denies_a_finding_does_not_show_it(hospital, library):
    "Reports of pneumonia say: no pleural effusion."
    paths = hospital.knowledge.paths(hospital.concept['Community acquired pneumonia'],
                                     hospital.concept['Hydronephrosis'], max_edges=1)
    assert paths == []
    assert affirmed('Small effusion. No pneumothorax.', 'effusion')
    assert not affirmed('There is no evidence of pneumonia.', 'pneumonia')


def test_every_test_of_a_condition_is_on_one_side_of_normal(hospital, library):
    label = dict(library.labs.select('lab', 'label').iter_rows())
    for condition in library.conditions.values():
        for lab, change in condition['labs'].items():
            disease = library.diagnoses[condition['icd10']]['title10']
            found = relations_between(hospital, label[lab], disease)
            side = 'raised_in' if change > 0 else 'lowered_in'
            assert abs(change) < .5 or found in ((side,), ('lowered_in',)), (lab, disease)


def test_terms_are_the_same_every_time():
    for first, again in zip(hospital_terms(), hospital_terms()):
        assert first.equals(again)


def test_ids_of_terms_are_none_of_umls():
    names, *_ = hospital_terms()
    assert names['cui'].str.contains('^H[0-9]{7}$').all()
    assert CUI.fullmatch(names['cui'][0])


def test_a_wrong_key_in_the_library_is_named(tmp_path):
    library = tmp_path/'library'
    shutil.copytree(LIBRARY, library)
    with (library/'relations.csv').open('a') as f:
        f.write('drug.nothing,may_treat,dx.I10,\n')
    with pytest.raises(ValueError, match='drug.nothing.*relations.csv'):
        hospital_terms(library)
