"Knowledge in RRF files: reading, compiling, shortest paths; the hospital's own terms and the open graph."
import gzip, re, shutil
import networkx as nx, numpy as np, polars as pl, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from ehr_r1.data.rrf import CUI, RRF, write_rrf
from ehr_r1.hospital.terms import hospital_terms, write_terms
from ehr_r1.synthesis import compiling as K
from ehr_r1.synthesis.open_knowledge import ID_LETTERS, open_knowledge
from ehr_r1.synthesis.knowledge import Knowledge
from ehr_r1.synthesis.compiling import compile_knowledge
from ehr_r1.synthesis.names import normal_form
from ehr_r1.synthesis.release_files import KnowledgeError, rrf_parts

def cui(i): return f'C{i:07d}'

def frame(rows, columns): return pl.DataFrame(rows, orient='row', schema=dict.fromkeys(columns.split(), pl.String))

def rrf(folder, edges, n=None, relation='may_treat'):
    "An RRF folder of concepts 0…n-1 and the relations given as (a, b) or (a, label, b)."
    edges = [e if len(e) == 3 else (e[0], relation, e[1]) for e in edges]
    n = n or 1 + max(max(a, b) for a, _, b in edges)
    names = frame([(cui(i), f'name {i}', 'TEST', str(i)) for i in range(n)], 'cui name source code').with_columns(preferred=pl.lit(True))
    write_rrf(folder, names, frame([(cui(a), r, cui(b), 'TEST') for a, r, b in edges], 'cui1 relation cui2 source'), frame([(cui(0), 'T047', 'Disease')], 'cui tui kind'))
    return folder

def compiled(folder, *args, **kwargs):
    rrf(folder/'rrf', *args, **kwargs); compile_knowledge(folder/'rrf', folder/'k')
    return Knowledge(folder/'k')

def conso(cui='C0000001', lat='ENG', ts='P', stt='PF', pref='Y', sab='MSH', code='D1', text='Fever', suppress='N'):
    return f'{cui}|{lat}|{ts}|L1|{stt}|S1|{pref}|A1||||{sab}|MH|{code}|{text}|0|{suppress}|256|\n'

def relation(a='C0000001', b='C0000002', rel='RO', rela='', suppress='N'): return f'{a}|A1|AUI|{rel}|{b}|A2|AUI|{rela}|R1||MSH|MSH||Y|{suppress}||\n'

def raw(folder, names, relations='', kinds='C0000001|T184|A2|Sign or Symptom|AT1||\n'):
    folder.mkdir(exist_ok=True)
    for name, text in (('MRCONSO.RRF', names), ('MRREL.RRF', relations), ('MRSTY.RRF', kinds)): (folder/name).write_text(text)
    return folder

# normal form

def norm(*texts): return pl.DataFrame(dict(x=texts)).select(normal_form(pl.col('x')))['x'].to_list()

@pytest.mark.parametrize('a, b', [('Kidney diseases', 'Disease of the Kidney'), ("Crohn's disease", 'Crohn disease'), ('Crohn’s disease', 'CROHNS DISEASE'), ('Sjögren syndrome', 'sjogren-syndrome'),
    ('Pneumonia, unspecified', 'pneumonia NOS'), ('Fracture of femur', 'femur fracture')])
def test_spellings_of_a_name_have_one_form(a, b): assert norm(a)[0] == norm(b)[0] != ''

@pytest.mark.parametrize('a, b', [('shock', 'no shock'), ('with sepsis', 'without sepsis'), ('infectious', 'non infectious'), ('type 1', 'type 2'), ('virus', 'viru'), ('abscess', 'absces'), ('iritis', 'iriti')])
def test_what_changes_the_meaning_stays(a, b): assert norm(a)[0] != norm(b)[0]

@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=5))
def test_normal_form_is_stable(texts):
    once = norm(*texts)
    assert norm(*(' '.join(reversed(x.split())) for x in once)) == norm(*once)
    assert all(x == x.strip() and '  ' not in x and x.split() == sorted(x.split()) for x in once)

# reading

@pytest.mark.parametrize('name, text, says', [
    ('MRCONSO.RRF', conso() + conso()[:-5] + '\n', r'MRCONSO.RRF, line 2: 17 fields'),
    ('MRCONSO.RRF', conso() + '|' + conso(), r'MRCONSO.RRF, line 2: 19 fields'),
    ('MRCONSO.RRF', conso() + conso().replace('|\n', '|x\n'), r'MRCONSO.RRF, line 2: 18 fields ended by a \|, must be 18 with nothing after'),
    ('MRCONSO.RRF', conso() + '\n', r'line 2: 0 fields'),
    ('MRCONSO.RRF', conso() + conso(cui='C12345'), r"MRCONSO.RRF, line 2: 'C12345' is not a concept id"),
    ('MRCONSO.RRF', conso() + conso(cui='C00000O1'), r"line 2: 'C00000O1' is not"),
    ('MRCONSO.RRF', conso() + conso(cui='c0000001'), r"line 2: 'c0000001' is not"),
    ('MRCONSO.RRF', conso() + conso(cui=''), r"line 2: '' is not"),
    ('MRREL.RRF', relation() + relation(b='0000002'), r"MRREL.RRF, line 2: '0000002' is not"),
    ('MRREL.RRF', relation() + relation().replace('|MSH', 'MSH', 1), r'MRREL.RRF, line 2: 15 fields'),
    ('MRSTY.RRF', 'C0000001|T184|A2|Sign|AT1||\nC0000001|T184|\n', r'MRSTY.RRF, line 2: 2 fields')])
def test_a_broken_line_is_named(tmp_path, name, text, says):
    folder = raw(tmp_path/'rrf', conso() + conso(cui='C0000002', text='Cold'), relation())
    (folder/name).write_text(text)
    with pytest.raises(KnowledgeError, match=says): compile_knowledge(folder, tmp_path/'k')
    with pytest.raises(KnowledgeError, match='compile_knowledge'): Knowledge(tmp_path/'k')

def test_the_line_is_right_in_later_parts_of_a_file(tmp_path):
    path = tmp_path/'MRREL.RRF'; path.write_text(relation()*500 + relation(a='X') + relation())
    with pytest.raises(KnowledgeError, match='line 501'): list(rrf_parts(path, ('CUI1',), size=1000))
    path.write_bytes(relation().encode()*500 + relation(rela='caf\xe9').encode('latin-1'))
    with pytest.raises(KnowledgeError, match='line 501: not UTF-8'): list(rrf_parts(path, ('CUI1',), size=1000))

def test_parts_do_not_matter(tmp_path):
    path = tmp_path/'MRREL.RRF'; path.write_text(''.join(relation(a=cui(i), rela=f'r{"é"*(i % 7)}') for i in range(300)))
    whole, = rrf_parts(path, ('CUI1', 'RELA'))
    assert pl.concat(rrf_parts(path, ('CUI1', 'RELA'), size=123)).equals(whole) and whole['CUI1'].to_list() == [2*10**7 + i for i in range(300)]

def test_quotes_windows_line_ends_and_a_missing_last_line_end(tmp_path):
    text = conso(text='6" wound') + conso(cui='C0000002', text='"quoted')
    folder = raw(tmp_path/'rrf', text)
    (folder/'MRCONSO.RRF').write_bytes(text.replace('\n', '\r\n').encode()[:-2])
    compile_knowledge(folder, tmp_path/'k')
    assert Knowledge(tmp_path/'k').names.collect()['name'].to_list() == ['6" wound', '"quoted']

def test_gzip_gives_the_same_bytes_and_damage_is_an_error(tmp_path):
    rrf(tmp_path/'a', [(0, 1), (1, 2)]); (tmp_path/'b').mkdir()
    for name in RRF: (tmp_path/'b'/f'{name}.gz').write_bytes(gzip.compress((tmp_path/'a'/name).read_bytes()))
    compile_knowledge(tmp_path/'a', tmp_path/'ka'); compile_knowledge(tmp_path/'b', tmp_path/'kb')
    assert {p.name: p.read_bytes() for p in (tmp_path/'ka').iterdir()} == {p.name: p.read_bytes() for p in (tmp_path/'kb').iterdir()}
    broken = tmp_path/'b'/'MRREL.RRF.gz'; broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(KnowledgeError, match='damaged gzip'): compile_knowledge(tmp_path/'b', tmp_path/'kb')

def test_a_missing_file_is_named(tmp_path):
    (raw(tmp_path/'rrf', conso())/'MRREL.RRF').unlink()
    with pytest.raises(KnowledgeError, match='MRREL.RRF: not in'): compile_knowledge(tmp_path/'rrf', tmp_path/'k')

def test_the_public_sample_lines_of_umls(shared, tmp_path):
    sample = shared/'data'/'umls-sample'
    if not sample.is_dir(): pytest.skip('shared data missing: umls-sample')
    for name in ('MRCONSO.RRF', 'MRSTY.RRF'): shutil.copy(sample/name, tmp_path/name)
    (tmp_path/'MRREL.RRF').write_text('C0000005|A26634265|AUI|RB|C0000039|A0016515|AUI||R1||MSH|MSH||Y|N||\n')
    compile_knowledge(tmp_path, tmp_path/'k'); k = Knowledge(tmp_path/'k')
    assert k.name('C0000005') == '(131)I-Macroaggregated Albumin' and k.kinds('C0000039') == ['Organic Chemical', 'Pharmacologic Substance']
    assert k.paths('C0000039', 'C0000005')[0].describe(k) == '1,2-Dipalmitoylphosphatidylcholine —broader than→ (131)I-Macroaggregated Albumin'
    layout = dict(x.split('|')[::2][:2] for x in (sample/'MRFILES.RRF').read_text().splitlines())
    assert all(tuple(layout[name].split(',')) == columns for name, columns in RRF.items())

# names

def test_which_names_are_kept_and_which_is_preferred(tmp_path):
    folder = raw(tmp_path/'rrf', conso(text='Fieber', lat='GER') + conso(text='Pyrexia', ts='S') + conso(text='Fever') + conso(text='Old', suppress='O') + conso(text='Fever', sab='ICD10CM', code='R50.9', ts='S')
        + conso(cui='C0000002', text='zeta', ts='S', stt='VO', pref='N') + conso(cui='C0000002', text='alpha', ts='S', stt='VO', pref='N') + conso(cui='C0000003', text='gone', suppress='Y'))
    counts = compile_knowledge(folder, tmp_path/'k'); k = Knowledge(tmp_path/'k'); names = k.names.collect()
    assert k.name('C0000001') == 'Fever' and k.name('C0000002') == 'alpha' and 'C0000003' not in k
    assert names.filter(cui='C0000001').select('name', 'source', 'code', 'preferred').rows() == [('Fever', 'MSH', 'D1', True), ('Fever', 'ICD10CM', 'R50.9', False), ('Pyrexia', 'MSH', 'D1', False)]
    assert names.group_by('cui').agg(pl.col('preferred').sum())['preferred'].to_list() == [1, 1]
    assert (counts['names_read'], counts['names_kept'], counts['names_foreign'], counts['names_suppressed'], counts['concepts']) == (8, 5, 1, 2, 2)

def test_no_english_name_is_an_error(tmp_path):
    with pytest.raises(KnowledgeError, match='English'): compile_knowledge(raw(tmp_path/'rrf', conso(lat='SPA')), tmp_path/'k')

def test_unknown_concepts(tmp_path):
    k = compiled(tmp_path, [(0, 1)])
    for wrong in ('C9999999', 'C1', '', 'fever', 'H0000000', None): assert wrong not in k and k.paths(wrong, cui(0)) == k.paths(cui(0), wrong) == []
    with pytest.raises(KnowledgeError, match='C9999999'): k.name('C9999999')
    assert k.kinds(cui(1)) == [] and k.kinds(cui(0)) == ['Disease']

def test_ids_of_several_letters(tmp_path):
    folder = raw(tmp_path/'rrf', ''.join(conso(cui=c, text=c) for c in ('C0000001', 'C0000002', 'H0000001', 'Z9999999')), relation(a='H0000001', b='Z9999999', rela='isa') + relation(a='B0000001'))
    counts = compile_knowledge(folder, tmp_path/'k'); k = Knowledge(tmp_path/'k')
    assert k.paths('Z9999999', 'H0000001')[0].describe(k) == 'Z9999999 —isa→ H0000001' and counts['relations_unnamed'] == 1 and counts['edges'] == 2

# relations

def described(folder, relations):
    compile_knowledge(raw(folder/'rrf', conso(text='one') + conso(cui='C0000002', text='two'), relations), folder/'k'); k = Knowledge(folder/'k')
    return [p.describe(k) for a, b in ((1, 2), (2, 1)) for p in k.paths(cui(a), cui(b))]

def test_a_relation_reads_from_the_second_concept_to_the_first(tmp_path):
    assert described(tmp_path, relation(a='C0000001', b='C0000002', rela='may_treat')) == ['one ←may treat— two', 'two —may treat→ one']

def test_each_direction_has_its_own_label(tmp_path):
    both = relation(rela='may_treat') + relation(a='C0000002', b='C0000001', rela='may_be_treated_by')
    assert described(tmp_path, both) == ['one —may be treated by→ two', 'two —may treat→ one']

@pytest.mark.parametrize('rel, said', [*K.SPELT.items(), ('ZZ', 'ZZ')])
def test_an_empty_rela_is_spelt_out(tmp_path, rel, said): assert described(tmp_path, relation(rel=rel))[1] == f'two —{said.replace("_", " ")}→ one'

def test_the_more_telling_label_stays(tmp_path):
    lines = [relation(rel='RB'), relation(rela='b_label'), relation(rela='a_label'), relation(a='C0000002', b='C0000001', rel='RN')]
    for order in (lines, lines[::-1]): assert described(tmp_path, ''.join(order)) == ['one ←a label— two', 'two —a label→ one']

@pytest.mark.parametrize('left_out', [dict(rela=x) for x in K.LEFT_OUT] + [dict(rel='XR'), dict(rel='DEL'), dict(rela='isa', suppress='O'), dict(rela='isa', b='C0000001')])
def test_relations_that_are_left_out(tmp_path, left_out):
    assert described(tmp_path, relation(**left_out)) == []
    assert described(tmp_path, relation(**left_out) + relation(rela='may_treat'))[1] == 'two —may treat→ one'

def test_left_out_relations_shorten_no_path(tmp_path):
    k = compiled(tmp_path, [(0, 'has_contraindicated_drug', 2), (0, 'isa', 1), (1, 'isa', 2)])
    assert [p.nodes for p in k.paths(cui(0), cui(2))] == [(cui(0), cui(1), cui(2))]

# paths

edges_of = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)).filter(lambda e: e[0] != e[1]), min_size=1, max_size=30)

@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edges_of)
def test_all_shortest_paths_are_those_of_networkx(tmp_path, edges):
    k = compiled(tmp_path, edges, n=12)
    g = nx.Graph([(cui(a), cui(b)) for a, b in edges]); g.add_nodes_from(map(cui, range(12)))
    stated = {(cui(a), cui(b)) for a, b in edges}
    for a in range(12):
        for b in range(12):
            found = k.paths(cui(a), cui(b), max_edges=12, max_paths=10**6)
            expected = set(map(tuple, nx.all_shortest_paths(g, cui(a), cui(b)))) if a != b and nx.has_path(g, cui(a), cui(b)) else set()
            assert {p.nodes for p in found} == expected and len(found) == len(expected)
            for p in found: assert all(((x, y) if f else (y, x)) in stated for x, y, f in zip(p.nodes, p.nodes[1:], p.forward)) and set(p.relations) == {'may_treat'}

def ladder(tmp_path, width=5, rungs=3):
    "0 – width nodes – 1 hub – width nodes – … : width**rungs shortest paths."
    edges, hub, n = [], 0, 1
    for _ in range(rungs):
        edges += [e for i in range(n, n + width) for e in ((hub, i), (i, n + width))]; hub = n + width; n = hub + 1
    return compiled(tmp_path, edges), cui(hub)

def test_limits(tmp_path):
    k, end = ladder(tmp_path)
    every = k.paths(cui(0), end, max_paths=10**6)
    assert len(every) == 125 == len(set(every)) and all(len(p.nodes) == 7 == len(set(p.nodes)) for p in every)
    assert k.paths(cui(0), end) == every[:10] and k.paths(cui(0), end, max_paths=1) == every[:1] and k.paths(cui(0), end, max_paths=0) == []
    assert k.paths(cui(0), end, max_edges=6, max_paths=1) == every[:1] and k.paths(cui(0), end, max_edges=5) == []
    assert k.paths(cui(0), end, max_nodes=3) == [] and len(k.paths(cui(0), end, max_nodes=10**6, max_paths=10**6)) == 125

def test_few_expansions_give_fewer_paths_but_never_longer_ones(tmp_path):
    near, far = range(1, 6), range(6, 11)
    k = compiled(tmp_path, [*((0, i) for i in near), *((i, j) for i in near for j in far), *((j, 11) for j in far)])
    every = k.paths(cui(0), cui(11), max_paths=10**6); assert len(set(every)) == len(every) == 25
    found = [k.paths(cui(0), cui(11), max_paths=10**6, max_nodes=n) for n in range(9)]
    assert [len(x) for x in found] == [0, 0, 0, 5, 10, 15, 20, 25, 25] and all(set(x) <= set(every) for x in found)

def test_concepts_with_few_relations_come_first(tmp_path):
    k = compiled(tmp_path, [(0, 1), (1, 9), (0, 2), (2, 9), *((1, i) for i in range(3, 9))])
    assert [p.nodes[1] for p in k.paths(cui(0), cui(9))] == [cui(2), cui(1)]

def test_the_order_of_lines_changes_nothing(tmp_path):
    rng = np.random.default_rng(7); edges = [tuple(map(int, e)) for e in rng.integers(0, 40, (120, 2)) if e[0] != e[1]]
    rrf(tmp_path/'a', edges, n=40); (tmp_path/'b').mkdir()
    for name in RRF: (tmp_path/'b'/name).write_text(''.join(rng.permutation((tmp_path/'a'/name).read_text().splitlines(True))))
    for x in 'ab': compile_knowledge(tmp_path/x, tmp_path/f'k{x}')
    assert {p.name: p.read_bytes() for p in (tmp_path/'ka').iterdir()} == {p.name: p.read_bytes() for p in (tmp_path/'kb').iterdir()}

def test_stacks_change_nothing(tmp_path, monkeypatch):
    rng = np.random.default_rng(8); edges = [tuple(map(int, e)) for e in rng.integers(0, 60, (200, 2)) if e[0] != e[1]]
    rrf(tmp_path/'rrf', edges, n=60); compile_knowledge(tmp_path/'rrf', tmp_path/'a')
    monkeypatch.setattr(K, 'STACK', 7); compile_knowledge(tmp_path/'rrf', tmp_path/'b')
    for p in (tmp_path/'a').glob('*.npy'): assert p.read_bytes() == (tmp_path/'b'/p.name).read_bytes(), p.name
    assert pl.read_parquet(tmp_path/'a'/'names.parquet').equals(pl.read_parquet(tmp_path/'b'/'names.parquet'))

def test_an_interrupted_compilation_is_not_mistaken_for_a_whole_one(tmp_path):
    k = compiled(tmp_path, [(0, 1)]); assert k.paths(cui(0), cui(1))
    (tmp_path/'rrf'/'MRREL.RRF').write_text('broken\n')
    with pytest.raises(KnowledgeError): compile_knowledge(tmp_path/'rrf', tmp_path/'k')
    with pytest.raises(KnowledgeError, match='interrupted'): Knowledge(tmp_path/'k')

def test_write_rrf_refuses_what_the_layout_cannot_hold(tmp_path):
    names = lambda c, x: frame([(c, x, 'S', '1')], 'cui name source code').with_columns(preferred=pl.lit(True))
    rel, kinds = frame([], 'cui1 relation cui2 source'), frame([], 'cui tui kind')
    for c, x in (('C0000001', 'a|b'), ('C0000001', 'a\nb'), ('C0000001', ' '), ('C0000001', None), ('C001', 'a'), (None, 'a')):
        with pytest.raises(ValueError, match='row 0'): write_rrf(tmp_path, names(c, x), rel, kinds)
    write_rrf(tmp_path, names('C0000001', 'é "x"'), rel, kinds); compile_knowledge(tmp_path, tmp_path/'k')
    assert Knowledge(tmp_path/'k').name('C0000001') == 'é "x"'

# the hospital's terms

@pytest.fixture(scope='module')
def hospital(tmp_path_factory):
    folder = tmp_path_factory.mktemp('terms'); write_terms(folder/'rrf'); compile_knowledge(folder/'rrf', folder/'k')
    k = Knowledge(folder/'k'); names = k.names.collect()
    return k, dict(names.select('name', 'cui').iter_rows()), names

def test_every_value_that_the_hospital_can_write_has_a_concept(hospital):
    from ehr_r1.hospital.conditions import read_library
    _, concept, _ = hospital; lib = read_library()
    values = [*lib.labs['label'], *lib.items['label'], *lib.drugs['name'], *lib.drugs['home'], *lib.drugs['pyxis'], *lib.drugs['atc_name'], *(s['test'][1] for s in lib.specimens.values())]
    for rows in (lib.diagnoses, lib.procedures): values += [r[c] for r in rows.values() for c in ('title10', 'title9', 'ccs_name', 'ccs9_name')]
    for c in lib.conditions.values(): values += [c['unit'], c['icu_unit'], c['service'], *c['weigh'], *(x[0] for x in c['imaging'])]
    assert sorted({v.strip() for v in values if v} - concept.keys()) == []

def test_no_name_leads_to_two_concepts(hospital):
    assert hospital[2].group_by(pl.col('name').str.to_lowercase()).agg(pl.col('cui').n_unique())['cui'].max() == 1

def test_facts_of_a_condition_reach_its_decisions_in_few_steps(hospital):
    from ehr_r1.hospital.conditions import read_library
    k, concept, _ = hospital; lib = read_library(); drug = dict(lib.drugs.select('drug', 'name').iter_rows()); lab = dict(lib.labs.select('lab', 'label').iter_rows())
    lengths = []
    for c in lib.conditions.values():
        me = concept[lib.diagnoses[c['icd10']]['title10']]
        for x in [*(drug[d] for d in c['drugs']), *(lab[x] for x in c['labs']), *(lib.procedures[p]['title10'] for p in c['procedures']), *(i[0] for i in c['imaging'])]:
            paths = k.paths(concept[x], me, max_paths=1)
            assert paths, (c['name'], x)
            lengths.append(len(paths[0].relations))
    assert np.mean(np.array(lengths) <= 4) > .97 and np.mean(np.array(lengths) == 1) > .6

def test_a_drug_that_everyone_gets_has_no_claim_on_the_condition(hospital):
    k, concept, _ = hospital
    assert len(k.paths(concept['Docusate Sodium'], concept['Unilateral primary osteoarthritis, right knee'])[0].relations) > 1
    assert k.paths(concept['Furosemide'], concept['Acute on chronic systolic heart failure'])[0].relations == ('may_treat',)

def test_terms_are_the_same_every_time():
    a, b = hospital_terms(), hospital_terms()
    assert all(x.equals(y) for x, y in zip(a, b)) and a[0]['cui'].str.contains('^H[0-9]{7}$').all() and not re.match('C', a[0]['cui'][0]) and CUI.fullmatch(a[0]['cui'][0])

def test_a_wrong_key_in_the_library_is_named(tmp_path):
    from ehr_r1.hospital.conditions import LIBRARY
    library = tmp_path/'library'; shutil.copytree(LIBRARY, library)
    with (library/'relations.csv').open('a') as f: f.write('drug.nothing,may_treat,dx.I10,\n')
    with pytest.raises(ValueError, match='drug.nothing.*relations.csv'): hospital_terms(library)

# the open graph

OBO = '''format-version: 1.2

[Term]
id: DOID:1
name: disease

[Term]
id: DOID:6000
name: heart failure
alt_id: DOID:395
synonym: "CHF \\"wet\\"" EXACT []
synonym: "weak heart" RELATED []
xref: UMLS_CUI:C0018802
xref: UMLS_CUI:C0018801
xref: ICD10CM:I50.9
xref: ICD10CM:I50-I51
xref: MESH:D006333
is_a: DOID:1 ! disease

[Term]
id: DOID:7
name: cor pulmonale
xref: UMLS_CUI:C0018801
xref: MESH:D000007
is_a: DOID:1 ! disease

[Term]
id: DOID:8
name: another
xref: MESH:D000007
is_a: DOID:7

[Term]
id: DOID:9
name: gone
is_a: DOID:1
is_obsolete: true

[Typedef]
id: part_of
name: part of
'''

def sources(folder):
    folder.mkdir(); tsv = lambda name, *rows: (folder/name).write_text(''.join('\t'.join(r) + '\n' for r in rows))
    (folder/'doid.2020.obo').write_text(OBO)
    tsv('allXREFinDO.tsv', ('id', 'label', 'xref'), ('"DOID:6000"', '"heart failure"', '"ICD9CM:428.0"'), ('"DOID:77"', '"new one"', '"UMLS_CUI:C7777777"'))
    tsv('disease-symptom.tsv', ('disease_id', 'disease_label', 'symptom_id', 'symptom_label'), ('DOID:395', 'x', 'SYMP:0000613', 'fever'), ('DOID:12345', 'unknown', 'SYMP:0000613', 'fever'))
    tsv('hetionet_nodes.tsv', ('id', 'name', 'kind'), ('Disease::DOID:7', 'cor pulmonale', 'Disease'), ('Symptom::D005334', 'Fevers', 'Symptom'), ('Symptom::D006333', 'Cardiac insufficiency', 'Symptom'),
        ('Symptom::D000007', 'Breathlessness', 'Symptom'), ('Anatomy::UBERON:0000948', 'heart', 'Anatomy'), ('Compound::DB00695', 'Furosemide', 'Compound'), ('Pharmacologic Class::N0000175366', 'Loop Diuretic', 'Pharmacologic Class'))
    tsv('hetionet_edges.tsv', ('source', 'metaedge', 'target'), ('Disease::DOID:7', 'DpS', 'Symptom::D005334'), ('Disease::DOID:7', 'DpS', 'Symptom::D006333'), ('Disease::DOID:8', 'DpS', 'Symptom::D000007'), ('Disease::DOID:7', 'DlA', 'Anatomy::UBERON:0000948'),
        ('Compound::DB00695', 'CtD', 'Disease::DOID:6000'), ('Pharmacologic Class::N0000175366', 'PCiC', 'Compound::DB00695'))
    tsv('labeledin_indications.tsv', ('rxnorm_id', 'disease_cui', 'disease_mesh_name', 'rxnorm_name'), ('4603', 'C0018802', '', 'furosemide'), ('4603', 'C0013604', 'Edema', 'furosemide'), ('4603', 'C5555555', '', 'furosemide'), ('1;2', 'C0013604', 'Edema', ''))
    return folder

def test_sources_become_one_graph(tmp_path):
    counts = open_knowledge(sources(tmp_path/'in'), tmp_path/'rrf'); compile_knowledge(tmp_path/'rrf', tmp_path/'k')
    k = Knowledge(tmp_path/'k'); names = k.names.collect(); c = dict(names.select('name', 'cui').iter_rows())
    said = {(k.name(p.nodes[0]), r if f else f'<{r}', k.name(p.nodes[1])) for a in set(names['cui']) for b in set(names['cui']) for p in k.paths(a, b, max_edges=1) for r, f in zip(p.relations, p.forward) if f}
    assert said == {('heart failure', 'isa', 'disease'), ('cor pulmonale', 'isa', 'disease'), ('another', 'isa', 'cor pulmonale'), ('heart failure', 'has_manifestation', 'fever'), ('cor pulmonale', 'has_manifestation', 'fever'),
        ('cor pulmonale', 'has_manifestation', 'heart failure'), ('another', 'has_manifestation', 'Breathlessness'), ('cor pulmonale', 'has_finding_site', 'heart'), ('Furosemide', 'may_treat', 'heart failure'),
        ('Furosemide', 'isa', 'Loop Diuretic'), ('Furosemide', 'may_treat', 'Edema')}
    assert {n: c[n] for n in ('heart failure', 'CHF "wet"', 'Cardiac insufficiency', 'cor pulmonale', 'fever', 'Fevers', 'Breathlessness', 'heart', 'Furosemide', 'furosemide', 'Loop Diuretic', 'Edema')} == {
        'heart failure': 'C0018801', 'CHF "wet"': 'C0018801', 'Cardiac insufficiency': 'C0018801', 'cor pulmonale': 'D0000007', 'fever': 'S0000613', 'Fevers': 'S0000613', 'Breathlessness': 'M0000007', 'heart': 'U0000948',
        'Furosemide': 'B0000695', 'furosemide': 'B0000695', 'Loop Diuretic': 'N0175366', 'Edema': 'C0013604'}
    assert not {'weak heart', 'gone', 'part of', 'new one'} & c.keys()
    assert set(names.filter(pl.col('source').str.starts_with('ICD')).select('cui', 'source', 'code').rows()) == {('C0018801', 'ICD10CM', 'I50.9'), ('C0018801', 'ICD9CM', '428.0')}
    assert {x: counts[x] for x in ('merged_by_id', 'merged_by_name', 'umls_ids_of_two_diseases', 'concepts_without_relation', 'indications_of_unnamed_diseases', 'indications_of_unnamed_drugs', 'relations_without_concept')} == {
        'merged_by_id': 1, 'merged_by_name': 2, 'umls_ids_of_two_diseases': 1, 'concepts_without_relation': 1, 'indications_of_unnamed_diseases': 1, 'indications_of_unnamed_drugs': 1, 'relations_without_concept': 1}
    assert k.kinds('C0018801') == ['Disease or Syndrome', 'Sign or Symptom'] and 'non-commercial' in (tmp_path/'rrf'/'SOURCES.txt').read_text()

def test_a_source_that_is_missing_is_left_out(tmp_path):
    folder = sources(tmp_path/'in'); (folder/'hetionet_edges.tsv').unlink()
    counts = open_knowledge(folder, tmp_path/'rrf')
    assert 'relations_hetionet' not in counts and counts['relations_labeledin'] == 2 and counts['anatomy_concepts'] == 0
    (folder/'doid.2020.obo').unlink()
    with pytest.raises(KnowledgeError, match='Disease Ontology'): open_knowledge(folder, tmp_path/'rrf')

@pytest.mark.parametrize('name, old, new, says', [('hetionet_edges.tsv', 'DlA', 'GiG', 'GiG'), ('hetionet_nodes.tsv', 'heart\tAnatomy', 'heart\tGene', "'Gene'"), ('disease-symptom.tsv', '\tfever\n', '\n', 'line 2: must have 4 fields'),
    ('allXREFinDO.tsv', 'xref', 'ref', 'line 1: no column xref'), ('doid.2020.obo', 'id: DOID:7', 'di: DOID:7', 'without id')])
def test_a_broken_source_is_named(tmp_path, name, old, new, says):
    folder = sources(tmp_path/'in'); (folder/name).write_text((folder/name).read_text().replace(old, new, 1))
    with pytest.raises(KnowledgeError, match=says): open_knowledge(folder, tmp_path/'rrf')

def test_the_real_open_sources(shared, tmp_path):
    data = shared/'data'/'knowledge'
    if not data.is_dir(): pytest.skip('shared data missing: knowledge')
    counts = open_knowledge(data, tmp_path/'rrf'); compile_knowledge(tmp_path/'rrf', tmp_path/'k'); k = Knowledge(tmp_path/'k')
    names = k.names.collect(); cui = {n.lower(): c for n, c in names.sort('preferred').select('name', 'cui').iter_rows()}
    assert counts['concepts'] > 8_000 and counts['relations'] > 20_000 and len(k) == counts['concepts']
    assert names.filter(~pl.col('cui').str.starts_with('C'))['cui'].str.head(1).is_in(list(ID_LETTERS.values())).all()
    assert k.paths(cui['warfarin'], cui['atrial fibrillation'])[0].describe(k) == 'Warfarin —may treat→ atrial fibrillation'
    assert names.filter(source='ICD10CM', code='I50.9')['cui'].unique().to_list() == [cui['congestive heart failure']]
