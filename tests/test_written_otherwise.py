"""What a program wrote its own way is read where that is safe, and refused with the true reason where not."""
import gzip
import json

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehr_r1.data.schema import TABLES
from ehr_r1.data.table_files import TableError
from ehr_r1.data.table_reading import bad_value, scan
from ehr_r1.synthesis.compiling import compile_knowledge
from ehr_r1.synthesis.release_files import KnowledgeError, rrf_file, rrf_parts
from ehr_r1.transfer.mimic_cdm.cases import read_cdm_cases
from ehr_r1.transfer.mimic_cdm.files import RELEASE_COLUMNS
from ehr_r1.transfer.trials.files import read_trial_pairs

STAYS = TABLES['edstays']
TRIAGE = TABLES['triage']


def edstays(path, **columns):
    row = dict(subject_id='7', hadm_id='20000012', stay_id='30000001', intime='2180-01-01 10:00:00',
               outtime='2180-01-01 12:00:00', gender='F', race='WHITE') | columns
    frame = pl.DataFrame({name: values if isinstance(values, pl.Series) else [values] for name, values in row.items()})
    frame.write_parquet(path) if path.suffix == '.parquet' else frame.write_csv(path)
    return path


def value(path, column='hadm_id', table=STAYS):
    return scan(path, table, path.name, [column]).collect(engine='streaming')[column].to_list()


@pytest.mark.parametrize('written', [
    '20000012.0', '20000012.000', '20000012.', ' 20000012', '20000012  ', ' 20000012.0 ',
])
def test_a_whole_number_is_read_however_it_is_written(tmp_path, written):
    assert value(edstays(tmp_path/'edstays.csv', hadm_id=written)) == [20000012]


@pytest.mark.parametrize('written', [
    '20000012.5', '20000012.01', '2e7', '20 000012', '20000012.0.0', '9'*30, '.0', 'x.0',
])
def test_what_is_not_exactly_a_whole_number_is_refused(tmp_path, written):
    path = edstays(tmp_path/'edstays.csv', hadm_id=written)
    with pytest.raises(pl.exceptions.PolarsError):
        value(path)
    message = str(bad_value(path, STAYS, path.name))
    assert 'hadm_id, row 1' in message and 'not a whole number' in message


@given(st.integers(0, 2**53 - 1), st.sampled_from(['', '.0', '.', ' ', '.00 ']))
def test_every_id_survives(tmp_path_factory, number, end):
    path = edstays(tmp_path_factory.mktemp('ids')/'edstays.csv', hadm_id=f'{number}{end}')
    assert value(path) == [number]


def test_floats_that_cannot_be_trusted_are_refused(tmp_path):
    exact = edstays(tmp_path/'a.parquet', hadm_id=pl.Series([20000012.]))
    assert value(exact) == [20000012]
    short = edstays(tmp_path/'b.parquet', hadm_id=pl.Series([20000012.], dtype=pl.Float32))
    with pytest.raises(pl.exceptions.PolarsError):
        value(short)
    assert 'stored as Float32' in str(bad_value(short, STAYS, 'b.parquet'))
    decimal = edstays(tmp_path/'c.parquet', hadm_id=pl.Series(['20000012.50']).cast(pl.Decimal(12, 2)))
    with pytest.raises(pl.exceptions.PolarsError):
        value(decimal)


@pytest.mark.parametrize('values, dtype, texts', [
    ([1., .5, None, 1250.], pl.Float64, ['1', '0.5', None, '1250']),
    ([1., .1], pl.Float32, ['1', '0.1']),
    ([7, None, 10], pl.Int64, ['7', None, '10']),
    (['1.50', '2.00'], pl.Decimal(5, 2), ['1.5', '2']),
])
def test_numbers_where_text_belongs_are_the_text_of_the_csv(tmp_path, values, dtype, texts):
    pain = pl.Series(values).cast(dtype)
    columns = {name: pl.Series([None]*len(pain), dtype=pl.String) for name in TRIAGE.columns}
    columns |= dict(subject_id=pl.Series([7]*len(pain)), pain=pain)
    pl.DataFrame(columns).write_parquet(tmp_path/'triage.parquet')
    assert value(tmp_path/'triage.parquet', 'pain', TRIAGE) == texts


def test_codes_that_lost_their_zeros_are_refused_for_that(tmp_path):
    path = tmp_path/'d_icd_diagnoses.parquet'
    pl.DataFrame(dict(icd_code=[90], icd_version=[9], long_title=['Colitis'])).write_parquet(path)
    with pytest.raises(TableError, match='icd_code: stored as Int64, so that zeros in front of a code are lost'):
        scan(path, TABLES['d_icd_diagnoses'], path.name)


# -- UMLS in pieces

CONCEPTS = ''.join(f'C{n:07}|ENG|P|L|PF|S|Y|A||||SRC|PT|{n}|name {n}|0|N||\n' for n in range(1, 60))


@pytest.fixture
def release(tmp_path):
    (tmp_path/'MRREL.RRF').write_text('C0000001||CUI|RO|C0000002||CUI|treats|R1||SRC|SRC|||N||\n')
    (tmp_path/'MRSTY.RRF').write_text('C0000001|T047||Disease|AT1||\n')
    return tmp_path


def split(folder, *cuts, end='.gz'):
    text, places = CONCEPTS.encode(), [0, *cuts, len(CONCEPTS)]
    for name, first, last in zip(('aa', 'ab', 'ac'), places, places[1:]):
        part = text[first:last]
        (folder/f'MRCONSO.RRF.{name}{end}').write_bytes(gzip.compress(part) if end else part)


@pytest.mark.parametrize('cuts', [(1000,), (CONCEPTS.index('\n') + 1,), (7, 1501), (1000, 1000)])
@pytest.mark.parametrize('end', ['.gz', ''])
def test_pieces_are_one_file_wherever_they_are_cut(release, cuts, end):
    (release/'MRCONSO.RRF').write_text(CONCEPTS)
    whole = compile_knowledge(release, release/'whole')
    (release/'MRCONSO.RRF').unlink()
    split(release, *cuts, end=end)
    assert compile_knowledge(release, release/'pieces') == whole
    parts = pl.concat(rrf_parts(rrf_file(release, 'MRCONSO.RRF'), ('CUI', 'STR'), size=300))
    assert len(parts) == 59


@pytest.mark.parametrize('gone', ['aa', 'ab'])
def test_a_piece_that_is_missing_is_named(release, gone):
    split(release, 1000, 1500)
    (release/f'MRCONSO.RRF.{gone}.gz').unlink()
    with pytest.raises(KnowledgeError, match='MRCONSO.RRF.ac.gz'):
        compile_knowledge(release, release/'out')


def test_the_first_piece_alone_is_refused(release):
    split(release, 1000)
    (release/'MRCONSO.RRF.ab.gz').unlink()
    with pytest.raises(KnowledgeError, match=r'\.aa to \.ab'):
        compile_knowledge(release, release/'out')


def test_a_wrong_line_is_counted_through_all_pieces(release):
    text = CONCEPTS.splitlines(keepends=True)
    (release/'MRCONSO.RRF.aa').write_text(''.join(text[:40]))
    (release/'MRCONSO.RRF.ab').write_text(''.join(text[40:50]) + 'wrong|\n')
    with pytest.raises(KnowledgeError, match='its 2 pieces as one, line 51'):
        compile_knowledge(release, release/'out')


# -- trials and CDM

def trial(number, **more):
    fields = dict(brief_title='T', brief_summary='S', inclusion_criteria='I', exclusion_criteria='E')
    return dict(nct_id=f'NCT0000000{number}') | fields | more


def trials(folder, *lines):
    (folder/'trec_2021_topics.jsonl').write_text(json.dumps(dict(_id='trec-20211', text='A cough.')) + '\n')
    judged = ''.join(f'trec-20211\tNCT0000000{n + 1}\t{n % 3}\n' for n in range(len(lines)))
    (folder/'trec_2021_qrels.tsv').write_text('query-id\tcorpus-id\tscore\n' + judged)
    (folder/'trials.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return read_trial_pairs(folder)


def test_gaps_of_trials_are_empty_and_counted(tmp_path):
    absent = trial(2)
    del absent['exclusion_criteria']
    pairs, counts = trials(tmp_path, trial(1), absent, trial(3, exclusion_criteria=None, brief_summary=''))
    assert pairs['exclusion'].to_list() == ['E', '', '']
    assert pairs['inclusion'].to_list() == ['I', 'I', 'I']
    assert counts['trials_without_exclusion'] == 2 and counts['trials_without_summary'] == 1


def test_a_field_that_no_trial_has_is_called_otherwise(tmp_path):
    lines = [{key.replace('exclusion_', 'excluding_'): text for key, text in trial(n).items()} for n in (1, 2)]
    with pytest.raises(TableError, match='exclusion_criteria.*excluding_criteria.*""'):
        trials(tmp_path, *lines)


@pytest.mark.parametrize('wrong', [7, ['E'], {}])
def test_a_field_of_another_kind_is_refused(tmp_path, wrong):
    with pytest.raises(TableError, match='exclusion_criteria, row 2'):
        trials(tmp_path, trial(1), trial(2, exclusion_criteria=wrong))


def test_a_release_without_its_list_is_refused_for_that(tmp_path):
    for name, columns in RELEASE_COLUMNS.items():
        (tmp_path/f'{name}.csv').write_text(','.join(columns) + '\n')
    (tmp_path/'lab_test_mapping.csv').write_text('itemid,label,fluid\n')
    with pytest.raises(TableError, match=r'pathology_ids\.json.*version 1\.1'):
        read_cdm_cases(tmp_path)
