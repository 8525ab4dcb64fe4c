"Reading MIMIC-IV's tables: the same frame from every file format, and one clear error for every kind of bad input."
import gzip
import tempfile
from collections import Counter
from datetime import datetime

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from ehr_r1.data.schema import CODE_MAPS, TABLES
from ehr_r1.data.table_files import TableError
from ehr_r1.data.table_reading import MISSING_WORDS
from ehr_r1.data.tables import PUBLISHED, SYNTHETIC_LICENCE, code_map, open_source

LABS = [
    '1,7,70,500,50912,,2180-05-06 10:00:00,2180-05-06 11:30:00,1.4,1.4,mg/dL,0.4,1.1,abnormal,ROUTINE,',
    '2,7,70,500,50983,,2180-05-06 10:00:00,2180-05-06 11:30:00,NEG,NaN,N/A,,,,ROUTINE,""',
    '3,7,,501,50983,,2180-07-01 09:00:00,,139,139,mEq/L,133,145,,STAT,"two lines\nof ""comment"", quoted"',
]
MANY_LABS = [LABS[0].replace('1,7', f'{i},7') for i in range(20_000)]
LABEVENTS = TABLES['labevents']
NAMES = ','.join(LABEVENTS.columns)


def write(root, name, *rows, header=None, suffix='.csv', newline='\n'):
    "A table's file."
    table = TABLES[name]
    path = root/table.module/(name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = newline.join([header or ','.join(table.columns), *rows, '']).encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith('.gz') else data)
    return path


def as_text(rows):
    "Laboratory results as a frame of text."
    return pl.read_csv('\n'.join([NAMES, *rows]).encode(), infer_schema=False)


@pytest.fixture
def root(tmp_path):
    "A folder with all tables, empty but for three lab results."
    folder = tmp_path/'mimic'
    for name in TABLES:
        write(folder, name)
    write(folder, 'labevents', *LABS)
    return folder


@pytest.fixture
def labs(root):
    "The file of laboratory results."
    return root/'hosp'/'labevents.csv'


@pytest.fixture
def without_labs(root, labs):
    "The folder without laboratory results."
    labs.unlink()
    return root


def read(root, table='labevents', columns=None, **kwargs):
    source = open_source(root)
    with source.explaining(table):
        return source.scan(table, columns, **kwargs).collect(engine='streaming')


def check(root, table='labevents'):
    return open_source(root).check([table], progress=False)


def refused(call, *args, says):
    "A call raises a `TableError` whose message is one line, holds some words, and names no folder of this computer."
    with pytest.raises(TableError) as caught:
        call(*args)
    message = str(caught.value)
    for words in says:
        assert words in message, message
    assert tempfile.gettempdir() not in message, message
    assert '\n' not in message, message


# -- what is read ------------------------------------------------------------------------------------------------------

def test_the_tables_and_their_modules():
    modules = [table.module for table in TABLES.values()]
    assert len(modules) == 41
    assert Counter(modules) == dict(hosp=22, icu=9, ed=6, note=4)


def test_columns_come_in_order_after_the_row_number(root):
    frame = read(root, row_index='row')
    assert frame.columns == ['row', *LABEVENTS.columns]
    assert frame['row'].to_list() == [0, 1, 2]


MAY_6, JULY_1 = datetime(2180, 5, 6, 10), datetime(2180, 7, 1, 9)


@pytest.mark.parametrize('column, values, dtype', [
    ('valuenum', [1.4, None, 139.0], pl.Float64),
    ('valueuom', ['mg/dL', None, 'mEq/L'], pl.String),
    ('hadm_id', [70, 70, None], pl.Int64),
    ('charttime', [MAY_6, MAY_6, JULY_1], pl.Datetime('us')),
    ('storetime', [MAY_6.replace(hour=11, minute=30)]*2 + [None], pl.Datetime('us')),
    ('comments', [None, None, 'two lines\nof "comment", quoted'], pl.String),
])
def test_types_and_missing_values(root, column, values, dtype):
    found = read(root)[column]
    assert found.to_list() == values
    assert found.dtype == dtype


@pytest.mark.parametrize('word', MISSING_WORDS)
@pytest.mark.parametrize('quote', ['', '"'])
def test_every_missing_word_is_null_in_every_type(root, word, quote):
    missing = quote + word + quote
    write(root, 'labevents', f'1,7,{missing},500,50912,' + ','.join([missing]*11))
    columns = ['hadm_id', 'order_provider_id', 'charttime', 'valuenum', 'valueuom', 'comments']
    assert read(root, columns=columns).row(0) == (None,)*6


def test_dates_in_both_forms(root):
    write(root, 'omr', '7,2180-05-06,1,BMI,22', '7,2180-05-07 00:00:00,1,BMI,22')
    days = read(root, 'omr')['chartdate']
    assert days.to_list() == [datetime(2180, 5, 6), datetime(2180, 5, 7)]


def test_times_with_fractions(root):
    header = 'subject_id,hadm_id,stay_id,starttime,storetime,itemid,value,valueuom,location,locationcategory'
    row = '7,70,700,2180-05-06 10:00:00,2180-05-06 11:00:00.090,1,5,,,'
    write(root, 'procedureevents', row, header=header)
    stored = read(root, 'procedureevents')['storetime'].item()
    assert stored == datetime(2180, 5, 6, 11, microsecond=90_000)


def test_codes_keep_leading_zeros(root):
    write(root, 'd_icd_diagnoses', '0090,9,Colitis', 'A000,10,Cholera')
    assert read(root, 'd_icd_diagnoses')['icd_code'].to_list() == ['0090', 'A000']


def test_columns_may_be_upper_case_extra_reordered_or_left_out(root):
    write(root, 'd_labitems', 'Glucose,x,50931', header='LABEL,extra,ITEMID', newline='\r\n')
    frame = read(root, 'd_labitems')
    assert frame.rows() == [(50931, 'Glucose', None, None)]
    assert frame.columns == ['itemid', 'label', 'fluid', 'category']
    assert frame.dtypes == [pl.Int64, pl.String, pl.String, pl.String]


def test_a_column_that_is_not_there_has_as_many_nulls_as_there_are_rows(root):
    write(root, 'd_labitems', 'Glucose,50931', header='label,itemid')
    assert read(root, 'd_labitems', ['fluid']).rows() == [(None,)]


def pandas_like(frame):
    "A frame as pandas stores it in Parquet."
    return frame.with_columns(
        pl.col('hadm_id', 'specimen_id').cast(pl.Float64).fill_null(float('nan')),
        pl.col('charttime').cast(pl.Datetime('ns')),
        pl.col('flag').cast(pl.Categorical),
        order_provider_id=float('nan'),
    )


PARQUET = {
    'typed': lambda frame: frame,
    'text': lambda frame: as_text(LABS),
    'by pandas': pandas_like,
}


def test_csv_and_gzip_are_the_same(root, labs):
    plain = read(root)
    labs.unlink()
    write(root, 'labevents', *LABS, suffix='.csv.gz')
    assert_frame_equal(read(root), plain)


@pytest.mark.parametrize('stored', PARQUET)
def test_csv_and_parquet_are_the_same(root, labs, stored):
    plain = read(root)
    labs.unlink()
    PARQUET[stored](plain).write_parquet(labs.with_suffix('.parquet'))
    assert_frame_equal(read(root, row_index='row').drop('row'), plain)


@pytest.mark.parametrize('suffix', ['.csv', '.csv.gz', '.parquet'])
def test_a_table_without_rows(root, suffix):
    columns = TABLES['chartevents'].columns
    path = root/'icu'/'chartevents.csv'
    path.unlink()
    if suffix == '.parquet':
        empty = pl.DataFrame(schema=dict.fromkeys(columns, pl.String))
        empty.write_parquet(path.with_suffix(suffix))
    else:
        write(root, 'chartevents', suffix=suffix)
    frame = read(root, 'chartevents')
    assert frame.shape == (0, 11)
    assert frame.schema['valuenum'] == pl.Float64


def test_flat_folders_are_found(root):
    for path in list(root.glob('*/*.csv')):
        path.rename(root/path.name)
    assert len(read(root)) == 3


def test_scanning_reads_nothing_yet(root):
    write(root, 'labevents', LABS[0].replace('50912', 'glucose'))
    assert isinstance(open_source(root).scan('labevents'), pl.LazyFrame)


# -- what is refused: files --------------------------------------------------------------------------------------------

def test_missing_table(root):
    (root/'icu'/'icustays.csv').unlink()
    refused(open_source, root, says=['icu/icustays', 'PhysioNet'])


def test_optional_tables_may_be_missing(root):
    for name in ('omr', 'provider', 'radiology', 'edstays'):
        (root/TABLES[name].module/f'{name}.csv').unlink()
    source = open_source(root)
    assert source.has('labevents')
    assert not source.has('omr')
    refused(source.scan, 'omr', says=['no table omr'])


@pytest.mark.parametrize('folder, says', [('..', 'Did you mean'), ('hosp', 'folder above')])
def test_wrong_folder_suggests_the_right_one(root, folder, says):
    refused(open_source, (root/folder).resolve(), says=[says, root.name])


def test_a_folder_that_is_not_there(root):
    refused(open_source, root/'nowhere', says=['no such folder'])


def test_one_table_in_two_files(root):
    write(root, 'labevents', *LABS, suffix='.csv.gz')
    refused(open_source, root, says=['hosp/labevents.csv.gz', 'hosp/labevents.csv', 'Keep one'])


def test_missing_column(root):
    write(root, 'labevents', header='labevent_id,subject_id,hadm_id')
    says = ['hosp/labevents.csv', 'no column itemid', 'labevent_id, subject_id, hadm_id']
    refused(open_source(root).scan, 'labevents', says=says)


@pytest.mark.parametrize('keep', [30, 0.5, -4])
def test_truncated_gzip(without_labs, keep):
    path = write(without_labs, 'labevents', *MANY_LABS, suffix='.csv.gz')
    whole = path.read_bytes()
    length = int(len(whole)*keep) if isinstance(keep, float) else keep
    path.write_bytes(whole[:length])
    refused(read, without_labs, says=['hosp/labevents.csv.gz', 'cut off'])


def test_damaged_gzip(without_labs):
    path = write(without_labs, 'labevents', *MANY_LABS, suffix='.csv.gz')
    data = bytearray(path.read_bytes())
    data[-6] ^= 255
    path.write_bytes(bytes(data))
    refused(read, without_labs, says=['hosp/labevents.csv.gz', 'damaged'])


PLAIN = '\n'.join([NAMES, *LABS, '']).encode()


@pytest.mark.parametrize('suffix, data, says', [
    ('.csv', gzip.compress(PLAIN), ['hosp/labevents.csv', 'Rename it to .csv.gz']),
    ('.csv.gz', PLAIN, ['hosp/labevents.csv.gz', 'not a gzip file']),
    ('.csv.gz', b'<!DOCTYPE html><html>Log in</html>', ['web page']),
    ('.parquet', PLAIN, ['hosp/labevents.parquet', 'cannot be read']),
    ('.parquet', b'', ['the file is empty']),
])
def test_names_that_do_not_say_what_is_inside(without_labs, suffix, data, says):
    (without_labs/'hosp'/f'labevents{suffix}').write_bytes(data)
    refused(read, without_labs, says=says)


def test_bytes_that_are_not_text(root, labs):
    write(root, 'labevents', LABS[0])
    labs.write_bytes(labs.read_bytes().replace(b'abnormal', b'abn\xffrmal'))
    refused(read, root, says=['line 2', 'UTF-8'])


def test_an_open_quotation_mark(root):
    write(root, 'labevents', LABS[0].replace('abnormal', '"abnormal'), LABS[0])
    refused(read, root, says=['hosp/labevents.csv', 'quotation mark'])


# -- what is refused: rows and values ----------------------------------------------------------------------------------

SUFFIXES = pytest.mark.parametrize('suffix', ['.csv', '.csv.gz', '.parquet'])


@pytest.mark.parametrize('old, new, column', [
    ('50912', 'glucose', 'itemid'),
    ('1.4,1.4', '1.4,high', 'valuenum'),
    ('50912', '50912.5', 'itemid'),
    ('2180-05-06 10:00:00', '06/05/2180 10:00', 'charttime'),
    ('2180-05-06 10:00:00', '2180-05-06', 'charttime'),
    (',7,70', ',,70', 'subject_id'),
    (',7,70', ',-7,70', 'subject_id'),
])
@SUFFIXES
def test_wrong_value_names_its_place(without_labs, old, new, column, suffix):
    rows = [LABS[2], LABS[0].replace(old, new, 1)]
    if suffix == '.parquet':
        as_text(rows).write_parquet(without_labs/'hosp'/'labevents.parquet')
    else:
        write(without_labs, 'labevents', *rows, suffix=suffix)
    refused(read, without_labs, says=['hosp/labevents' + suffix, f'column {column}', 'row 2'])
    refused(check, without_labs, says=[f'column {column}', 'row 2'])


def test_wrong_value_in_a_column_nobody_asked_for_is_found_by_check(root):
    write(root, 'labevents', LABS[0].replace('1.1,abnormal', 'high,abnormal'))
    assert len(read(root, columns=['subject_id'])) == 1
    refused(check, root, says=['ref_range_upper', 'row 1'])


@pytest.mark.parametrize('dtype, value, column', [
    (pl.Float64, 41.5, 'itemid'),
    (pl.Boolean, True, 'itemid'),
    (pl.Boolean, True, 'flag'),
    (pl.Int64, 2180, 'charttime'),
    (pl.Datetime('us', 'UTC'), datetime(2180, 1, 1), 'charttime'),
])
def test_parquet_of_another_type(root, labs, dtype, value, column):
    frame = read(root).with_columns(pl.lit(value, dtype=dtype).alias(column))
    labs.unlink()
    frame.write_parquet(labs.with_suffix('.parquet'))
    refused(read, root, says=['hosp/labevents.parquet', f'column {column}'])


@pytest.mark.parametrize('suffix', ['.csv', '.csv.gz'])
def test_a_line_with_too_many_fields(without_labs, suffix):
    write(without_labs, 'labevents', LABS[2], LABS[0] + ',more', suffix=suffix)
    refused(read, without_labs, says=['row 2', '17 fields', '16'])


@pytest.mark.parametrize('suffix', ['.csv', '.csv.gz'])
def test_a_line_with_too_few_fields(without_labs, suffix):
    write(without_labs, 'labevents', LABS[2], '2,7,70', LABS[0], suffix=suffix)
    refused(check, without_labs, says=['row 2', '3 fields', '16'])


def test_a_file_cut_off_in_its_last_line(root, labs):
    write(root, 'labevents', LABS[0], LABS[0])
    labs.write_bytes(labs.read_bytes()[:-40])
    refused(open_source(root).scan, 'labevents', says=['hosp/labevents.csv', 'row 2', 'fields'])


def test_the_last_line_break_may_be_missing(root, labs):
    write(root, 'labevents', LABS[0], LABS[2])
    labs.write_bytes(labs.read_bytes()[:-1])
    assert len(read(root)) == 2


def test_empty_lines_are_rows_without_a_patient(root):
    write(root, 'labevents', LABS[0], '', LABS[1])
    refused(read, root, says=['row 2', 'without a patient'])


@pytest.mark.parametrize('table, rows, says', [
    ('labevents', [*LABS, LABS[1]], ['rows 2 and 4', 'labevent_id=2']),
    ('d_icd_diagnoses', ['0090,9,Colitis', '0090,10,Colitis', '009,9,Other', '0090,9,Again'],
     ['rows 1 and 4', 'icd_code=0090', 'icd_version=9']),
    ('d_labitems', ['1,a,,', ',b,,'], ['row 2', 'key is missing']),
])
def test_a_key_that_does_not_name_one_row(root, table, rows, says):
    write(root, table, *rows)
    refused(check, root, table, says=says)


def test_an_engine_error_that_no_table_caused_goes_through(root):
    source = open_source(root)
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        with source.explaining('labevents'):
            source.scan('labevents').select('nothing').collect()


@pytest.mark.parametrize('args', [('labs',), ('labevents', ['subject'])])
def test_an_unknown_name_is_a_mistake_of_the_caller(root, args):
    with pytest.raises(KeyError):
        open_source(root).scan(*args)


# -- releases, access, code maps ---------------------------------------------------------------------------------------

def test_access_without_a_licence_is_credentialed(root):
    assert open_source(root).access == 'credentialed'


@pytest.mark.parametrize('text, access', [
    ('PhysioNet Credentialed Health Data License 1.5.0', 'credentialed'),
    ('CC0 1.0 Universal', 'open'),
    (SYNTHETIC_LICENCE, 'open'),
])
def test_access_is_open_only_by_a_licence(root, text, access):
    (root/'LICENSE.txt').write_text(text)
    assert open_source(root).access == access


def test_a_synthetic_hospital_says_so(root):
    (root/'LICENSE.txt').write_text(SYNTHETIC_LICENCE)
    assert open_source(root).version == 'synthetic'


def fill(root, patients, admissions):
    "As many patients and admissions as a release has."
    write(root, 'patients', *['7,F,50,']*patients, header='subject_id,gender,anchor_age,dod')
    write(root, 'admissions', *['7,70,,,,,,,,,,,,,,']*admissions)


@pytest.mark.parametrize('patients, admissions, version', [
    (3, 4, 'unknown'),
    (100, 275, 'demo-2.2'),
    (*PUBLISHED['2.2'].values(), '2.2'),
    (*PUBLISHED['3.1'].values(), '3.x'),
])
def test_releases_by_their_counts(root, patients, admissions, version):
    fill(root, patients, admissions)
    assert open_source(root).version == version


def test_the_change_log_tells_releases_of_the_same_counts_apart_and_the_folder_before_it(root):
    fill(root, *PUBLISHED['3.1'].values())
    (root/'CHANGELOG.txt').write_text('## v3.0\nnew patients\n## v3.1\nfewer mistakes\n')
    assert open_source(root).version == '3.1'
    named = root.parent/'mimic-iv-3.0'
    root.rename(named)
    assert open_source(named).version == '3.0'


def write_map(folder, *titles, header='icd_code,icd_version,long_title', name='d_ccs_diagnoses'):
    folder.mkdir(exist_ok=True)
    rows = [header, *[f'0090,9,{title}' for title in titles], '']
    (folder/f'{name}.csv').write_text('\n'.join(rows))


def read_map(root, **where):
    return code_map(open_source(root, **where), 'd_ccs_diagnoses')


def test_code_maps_may_be_missing(root):
    assert open_source(root).codes is None
    assert read_map(root) is None


def test_one_code_map_may_be_missing(root):
    write_map(root/'codes', 'Enteritis')
    assert code_map(open_source(root), 'd_atc_prescriptions') is None


def test_code_maps_beside_the_folder_in_it_and_named_the_nearest_first(root, tmp_path):
    write_map(tmp_path/'codes', 'beside')
    assert read_map(root).rows() == [('0090', '9', 'beside')]
    write_map(root/'codes', 'inside')
    assert read_map(root).rows() == [('0090', '9', 'inside')]
    write_map(tmp_path/'mine', 'named')
    assert read_map(root).rows() == [('0090', '9', 'inside')]
    assert read_map(root, codes=tmp_path/'mine').rows() == [('0090', '9', 'named')]


def test_a_code_twice_in_a_map(root):
    write_map(root/'codes', 'a', 'b')
    refused(read_map, root, says=['codes/d_ccs_diagnoses.csv', 'rows 1 and 2'])


def test_a_map_without_a_column(root):
    write_map(root/'codes', header='icd_code,long_title')
    refused(read_map, root, says=['codes/d_ccs_diagnoses.csv', 'no column icd_version'])


def test_a_folder_of_maps_that_is_not_there(root, tmp_path):
    with pytest.raises(TableError):
        open_source(root, codes=tmp_path/'nowhere')


# -- the demo ----------------------------------------------------------------------------------------------------------

def test_the_demo_has_its_published_rows(demo):
    source = open_source(demo)
    assert (source.version, source.access) == ('demo-2.2', 'open')
    counts = source.check(progress=False)
    known = counts.filter(pl.col('published').is_not_null())
    assert len(known) == 34
    assert (known['rows'] == known['published']).all()


def test_the_demo_has_the_columns_of_the_description(demo):
    for name, path in open_source(demo).files.items():
        with gzip.open(path, 'rt') as opened:
            header = opened.readline().lower().strip()
        assert header.split(',') == list(TABLES[name].columns)


def test_demo_tables_in_parquet(demo, tmp_path):
    source = open_source(demo)
    converted = ('microbiologyevents', 'procedureevents', 'medrecon', 'patients')
    for name, path in source.files.items():
        folder = tmp_path/TABLES[name].module
        folder.mkdir(exist_ok=True)
        if name in converted:
            source.scan(name).collect().write_parquet(folder/f'{name}.parquet')
        else:
            (folder/path.name).symlink_to(path)
    other = open_source(tmp_path)
    for name in converted:
        assert_frame_equal(other.scan(name).collect(), source.scan(name).collect())


@pytest.mark.parametrize('name', CODE_MAPS)
def test_code_maps_of_the_demo(demo, name):
    source = open_source(demo)
    if source.codes is None:
        pytest.skip('no code maps beside the demo')
    codes = code_map(source, name)
    assert set(codes.dtypes) == {pl.String}
    assert set(codes.columns) == CODE_MAPS[name].needed
    assert len(codes) > 80_000
