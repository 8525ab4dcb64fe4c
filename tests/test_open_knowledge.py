"The open graph: sources become one graph in RRF files, and a broken source is named."
from types import SimpleNamespace

import polars as pl
import pytest

from ehr_r1.synthesis.compiling import compile_knowledge
from ehr_r1.synthesis.knowledge import Knowledge
from ehr_r1.synthesis.open_knowledge import ID_LETTERS, open_knowledge
from ehr_r1.synthesis.release_files import KnowledgeError

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

TABLES = { # columns are parted by two spaces here
    'allXREFinDO.tsv': '''
id  label  xref
"DOID:6000"  "heart failure"  "ICD9CM:428.0"
"DOID:77"  "new one"  "UMLS_CUI:C7777777"''',
    'disease-symptom.tsv': '''
disease_id  disease_label  symptom_id  symptom_label
DOID:395  x  SYMP:0000613  fever
DOID:12345  unknown  SYMP:0000613  fever''',
    'hetionet_nodes.tsv': '''
id  name  kind
Disease::DOID:7  cor pulmonale  Disease
Symptom::D005334  Fevers  Symptom
Symptom::D006333  Cardiac insufficiency  Symptom
Symptom::D000007  Breathlessness  Symptom
Anatomy::UBERON:0000948  heart  Anatomy
Compound::DB00695  Furosemide  Compound
Pharmacologic Class::N0000175366  Loop Diuretic  Pharmacologic Class''',
    'hetionet_edges.tsv': '''
source  metaedge  target
Disease::DOID:7  DpS  Symptom::D005334
Disease::DOID:7  DpS  Symptom::D006333
Disease::DOID:8  DpS  Symptom::D000007
Disease::DOID:7  DlA  Anatomy::UBERON:0000948
Compound::DB00695  CtD  Disease::DOID:6000
Pharmacologic Class::N0000175366  PCiC  Compound::DB00695''',
    'labeledin_indications.tsv': '''
rxnorm_id  disease_cui  disease_mesh_name  rxnorm_name
4603  C0018802    furosemide
4603  C0013604  Edema  furosemide
4603  C5555555    furosemide
1;2  C0013604  Edema  ''',
}


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path/'in'
    folder.mkdir()
    (folder/'doid.2020.obo').write_text(OBO)
    for name, text in TABLES.items():
        (folder/name).write_text(text.lstrip('\n').replace('  ', '\t') + '\n')
    return folder


@pytest.fixture
def graph(sources, tmp_path):
    counts = open_knowledge(sources, tmp_path/'rrf')
    compile_knowledge(tmp_path/'rrf', tmp_path/'k')
    knowledge = Knowledge(tmp_path/'k')
    names = knowledge.names.collect()
    cui = dict(names.select('name', 'cui').iter_rows())
    return SimpleNamespace(knowledge=knowledge, counts=counts, names=names, cui=cui, rrf=tmp_path/'rrf')


def test_relations_of_all_sources_are_one_graph(graph):
    k, cuis = graph.knowledge, graph.names['cui'].unique().to_list()
    steps = [path for a in cuis for b in cuis for path in k.paths(a, b, max_edges=1)]
    forward = [path for path in steps if path.forward == (True,)]
    said = {path.describe(k) for path in forward}
    assert said == {
        'heart failure —isa→ disease',
        'cor pulmonale —isa→ disease',
        'another —isa→ cor pulmonale',
        'heart failure —has manifestation→ fever',
        'cor pulmonale —has manifestation→ fever',
        'cor pulmonale —has manifestation→ heart failure',
        'another —has manifestation→ Breathlessness',
        'cor pulmonale —has finding site→ heart',
        'Furosemide —may treat→ heart failure',
        'Furosemide —isa→ Loop Diuretic',
        'Furosemide —may treat→ Edema',
    }


@pytest.mark.parametrize('name, cui', [
    ('heart failure', 'C0018801'),
    ('CHF "wet"', 'C0018801'),
    ('Cardiac insufficiency', 'C0018801'),
    ('cor pulmonale', 'D0000007'),
    ('fever', 'S0000613'),
    ('Fevers', 'S0000613'),
    ('Breathlessness', 'M0000007'),
    ('heart', 'U0000948'),
    ('Furosemide', 'B0000695'),
    ('furosemide', 'B0000695'),
    ('Loop Diuretic', 'N0175366'),
    ('Edema', 'C0013604'),
])
def test_names_of_one_thing_are_one_concept(graph, name, cui):
    assert graph.cui[name] == cui


def test_names_that_are_no_names_or_lead_nowhere_are_left_out(graph):
    assert not {'weak heart', 'gone', 'part of', 'new one'} & graph.cui.keys()


def test_icd_codes_stand_beside_names(graph):
    codes = graph.names.filter(pl.col('source').str.starts_with('ICD')).select('cui', 'source', 'code')
    assert set(codes.rows()) == {('C0018801', 'ICD10CM', 'I50.9'), ('C0018801', 'ICD9CM', '428.0')}


@pytest.mark.parametrize('what, n', [
    ('merged_by_id', 1),
    ('merged_by_name', 2),
    ('umls_ids_of_two_diseases', 1),
    ('concepts_without_relation', 1),
    ('indications_of_unnamed_diseases', 1),
    ('indications_of_unnamed_drugs', 1),
    ('relations_without_concept', 1),
])
def test_what_was_merged_and_dropped_is_counted(graph, what, n):
    assert graph.counts[what] == n


def test_a_disease_that_is_a_symptom_has_both_kinds(graph):
    assert graph.knowledge.kinds('C0018801') == ['Disease or Syndrome', 'Sign or Symptom']


def test_terms_of_the_sources_go_with_the_files(graph):
    assert 'non-commercial' in (graph.rrf/'SOURCES.txt').read_text()


def test_a_source_that_is_missing_is_left_out(sources, tmp_path):
    (sources/'hetionet_edges.tsv').unlink()
    counts = open_knowledge(sources, tmp_path/'rrf')
    assert 'relations_hetionet' not in counts
    assert counts['relations_labeledin'] == 2
    assert counts['anatomy_concepts'] == 0


def test_the_disease_ontology_must_be_there(sources, tmp_path):
    (sources/'doid.2020.obo').unlink()
    with pytest.raises(KnowledgeError, match='Disease Ontology'):
        open_knowledge(sources, tmp_path/'rrf')


@pytest.mark.parametrize('name, old, new, says', [
    ('hetionet_edges.tsv', 'DlA', 'GiG', 'GiG'),
    ('hetionet_nodes.tsv', 'heart\tAnatomy', 'heart\tGene', "'Gene'"),
    ('hetionet_nodes.tsv', 'Anatomy::', 'Organ::', "'Organ::UBERON:0000948' does not begin with a kind"),
    ('hetionet_edges.tsv', 'Symptom::', 'Symptm::', "'Symptm::D005334' does not begin with a kind"),
    ('hetionet_edges.tsv', 'Symptom::', '', "'D005334' does not begin with a kind"),
    ('disease-symptom.tsv', '\tfever\n', '\n', 'line 2: must have 4 fields'),
    ('disease-symptom.tsv', '\tfever\n', '\tm\udce9\n', 'line 2: not UTF-8'),
    ('allXREFinDO.tsv', 'xref', 'ref', 'line 1: no column xref'),
    ('doid.2020.obo', 'id: DOID:7', 'di: DOID:7', 'without id'),
])
def test_a_broken_source_is_named(sources, tmp_path, name, old, new, says):
    text = (sources/name).read_text().replace(old, new, 1)
    (sources/name).write_text(text, errors='surrogateescape')
    with pytest.raises(KnowledgeError, match=says):
        open_knowledge(sources, tmp_path/'rrf')


# the sources themselves

@pytest.fixture(scope='module')
def real(shared, tmp_path_factory):
    data = shared/'data'/'knowledge'
    if not data.is_dir():
        pytest.skip('shared data missing: knowledge')
    folder = tmp_path_factory.mktemp('real')
    counts = open_knowledge(data, folder/'rrf')
    compile_knowledge(folder/'rrf', folder/'k')
    knowledge = Knowledge(folder/'k')
    names = knowledge.names.collect()
    by_name = names.sort('preferred').select(pl.col('name').str.to_lowercase(), 'cui')
    return SimpleNamespace(knowledge=knowledge, counts=counts, names=names, cui=dict(by_name.iter_rows()))


def test_the_real_sources_give_a_graph_of_some_size(real):
    assert real.counts['concepts'] > 8_000
    assert real.counts['relations'] > 20_000
    assert len(real.knowledge) == real.counts['concepts']


def test_ids_of_the_real_sources_have_their_letters(real):
    own = real.names.filter(~pl.col('cui').str.starts_with('C'))
    assert own['cui'].str.head(1).is_in(list(ID_LETTERS.values())).all()


def test_a_path_of_the_real_sources(real):
    path = real.knowledge.paths(real.cui['warfarin'], real.cui['atrial fibrillation'])[0]
    assert path.describe(real.knowledge) == 'Warfarin —may treat→ atrial fibrillation'


def test_an_icd_code_leads_to_its_disease(real):
    coded = real.names.filter(source='ICD10CM', code='I50.9')
    assert coded['cui'].unique().to_list() == [real.cui['congestive heart failure']]
