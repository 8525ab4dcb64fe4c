"Reading MIMIC-IV's tables: the same frame from every file format, and one clear error for every kind of bad input."
import gzip, tempfile
from datetime import datetime
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from ehr_r1.data.schema import CODE_MAPS, TABLES
from ehr_r1.data.table_reading import MISSING_WORDS as MISSING
from ehr_r1.data.tables import PUBLISHED, TableError, code_map, open_source

LABS = ['1,7,70,500,50912,,2180-05-06 10:00:00,2180-05-06 11:30:00,1.4,1.4,mg/dL,0.4,1.1,abnormal,ROUTINE,',
        '2,7,70,500,50983,,2180-05-06 10:00:00,2180-05-06 11:30:00,NEG,NaN,N/A,,,,ROUTINE,""',
        '3,7,,501,50983,,2180-07-01 09:00:00,,139,139,mEq/L,133,145,,STAT,"two lines\nof ""comment"", quoted"']

def write(root, name, *rows, header=None, suffix='.csv', newline='\n'):
    t = TABLES[name]
    path = root/t.module/(name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = newline.join([header or ','.join(t.columns), *rows, '']).encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith('.gz') else data)
    return path

@pytest.fixture
def root(tmp_path):
    "A folder with all tables, empty but for three lab results."
    folder = tmp_path/'mimic'
    for name in TABLES: write(folder, name)
    write(folder, 'labevents', *LABS)
    return folder

def read(root, table='labevents', columns=None, **kwargs):
    source = open_source(root)
    with source.explaining(table): return source.scan(table, columns, **kwargs).collect(engine='streaming')

def refused(call, *parts):
    "The message of a `TableError`, which must hold these parts."
    with pytest.raises(TableError) as caught: call()
    message = str(caught.value)
    for part in parts: assert part in message, message
    assert tempfile.gettempdir() not in message and '\n' not in message, message
    return message

def test_the_tables_and_their_modules():
    modules = [t.module for t in TABLES.values()]
    assert len(TABLES) == 41 and [modules.count(m) for m in ('hosp', 'icu', 'ed', 'note')] == [22, 9, 6, 4]

def test_types_and_missing_values(root):
    frame = read(root, row_index='row')
    assert frame.columns == ['row', *TABLES['labevents'].columns]
    assert frame['row'].to_list() == [0, 1, 2]
    assert frame['valuenum'].to_list() == [1.4, None, 139.0] and frame['valueuom'].to_list() == ['mg/dL', None, 'mEq/L']
    assert frame['hadm_id'].to_list() == [70, 70, None] and frame.schema['hadm_id'] == pl.Int64
    assert frame['charttime'][2] == datetime(2180, 7, 1, 9) and frame.schema['charttime'] == pl.Datetime('us') and frame['storetime'][2] is None
    assert frame['comments'].to_list() == [None, None, 'two lines\nof "comment", quoted']

@pytest.mark.parametrize('word', MISSING)
@pytest.mark.parametrize('quote', ['', '"'])
def test_every_missing_word_is_null_in_every_type(root, word, quote):
    w = quote + word + quote
    write(root, 'labevents', f'1,7,{w},500,50912,{w},{w},{w},{w},{w},{w},{w},{w},{w},{w},{w}')
    row = read(root, columns=['hadm_id', 'order_provider_id', 'charttime', 'valuenum', 'valueuom', 'comments']).row(0)
    assert row == (None,) * 6

def test_dates_in_both_forms_and_times_with_fractions(root):
    write(root, 'omr', '7,2180-05-06,1,BMI,22', '7,2180-05-07 00:00:00,1,BMI,22')
    assert read(root, 'omr')['chartdate'].to_list() == [datetime(2180, 5, 6), datetime(2180, 5, 7)]
    header = 'subject_id,hadm_id,stay_id,starttime,storetime,itemid,value,valueuom,location,locationcategory'
    write(root, 'procedureevents', '7,70,700,2180-05-06 10:00:00,2180-05-06 11:00:00.090,1,5,,,', header=header)
    assert read(root, 'procedureevents')['storetime'].to_list() == [datetime(2180, 5, 6, 11, 0, 0, 90_000)]

def test_codes_keep_leading_zeros(root):
    write(root, 'd_icd_diagnoses', '0090,9,Colitis', 'A000,10,Cholera')
    assert read(root, 'd_icd_diagnoses')['icd_code'].to_list() == ['0090', 'A000']

def test_columns_may_be_upper_case_extra_reordered_or_left_out(root):
    write(root, 'd_labitems', 'Glucose,x,50931', header='LABEL,extra,ITEMID', newline='\r\n')
    frame = read(root, 'd_labitems')
    assert frame.rows() == [(50931, 'Glucose', None, None)]
    assert frame.schema == pl.Schema(dict(itemid=pl.Int64, label=pl.String, fluid=pl.String, category=pl.String))
    assert read(root, 'd_labitems', ['fluid']).rows() == [(None,)]

def test_csv_gz_and_parquet_are_the_same(root):
    plain = read(root)
    (root/'hosp'/'labevents.csv').unlink()
    gz = write(root, 'labevents', *LABS, suffix='.csv.gz')
    assert_frame_equal(read(root), plain)
    gz.unlink()
    plain.write_parquet(root/'hosp'/'labevents.parquet')
    assert_frame_equal(read(root), plain)
    pl.read_csv(''.join(','.join(TABLES['labevents'].columns) + '\n' + '\n'.join(LABS)).encode(), infer_schema=False).write_parquet(root/'hosp'/'labevents.parquet')
    assert_frame_equal(read(root), plain)
    pandas_like = plain.with_columns(pl.col('hadm_id', 'specimen_id').cast(pl.Float64).fill_null(float('nan')),
        pl.col('charttime').cast(pl.Datetime('ns')), pl.col('flag').cast(pl.Categorical), order_provider_id=float('nan'))
    pandas_like.write_parquet(root/'hosp'/'labevents.parquet')
    assert_frame_equal(read(root, row_index='row').drop('row'), plain)

@pytest.mark.parametrize('suffix', ['.csv', '.csv.gz', '.parquet'])
def test_a_table_without_rows(root, suffix):
    (root/'icu'/'chartevents.csv').unlink()
    if suffix == '.parquet': pl.DataFrame(schema={c: pl.String for c in TABLES['chartevents'].columns}).write_parquet(root/'icu'/'chartevents.parquet')
    else: write(root, 'chartevents', suffix=suffix)
    frame = read(root, 'chartevents')
    assert frame.shape == (0, 11) and frame.schema['valuenum'] == pl.Float64

def test_flat_folders_are_found(root):
    for path in [*root.glob('*/*.csv')]: path.rename(root/path.name)
    assert len(read(root)) == 3

def test_scanning_reads_nothing_yet(root):
    write(root, 'labevents', LABS[0].replace('50912', 'glucose'))
    assert isinstance(open_source(root).scan('labevents'), pl.LazyFrame)

# -- what is refused ---------------------------------------------------------------------------------------------------

def test_missing_table(root):
    (root/'icu'/'icustays.csv').unlink()
    refused(lambda: open_source(root), 'icu/icustays', 'PhysioNet')

def test_optional_tables_may_be_missing(root):
    for name in ('omr', 'provider', 'radiology', 'edstays'): (root/TABLES[name].module/f'{name}.csv').unlink()
    source = open_source(root)
    assert not source.has('omr') and source.has('labevents')
    refused(lambda: source.scan('omr'), 'no table omr')

def test_wrong_folder_suggests_the_right_one(root):
    refused(lambda: open_source(root.parent), 'Did you mean', root.name)
    refused(lambda: open_source(root/'hosp'), 'folder above', root.name)
    refused(lambda: open_source(root/'nowhere'), 'no such folder')

def test_one_table_in_two_files(root):
    write(root, 'labevents', *LABS, suffix='.csv.gz')
    refused(lambda: open_source(root), 'hosp/labevents.csv.gz', 'hosp/labevents.csv', 'Keep one')

def test_missing_column(root):
    write(root, 'labevents', header='labevent_id,subject_id,hadm_id')
    refused(lambda: open_source(root).scan('labevents'), 'hosp/labevents.csv', 'no column itemid', 'labevent_id, subject_id, hadm_id')

@pytest.mark.parametrize('old, new, column', [('50912', 'glucose', 'itemid'), ('1.4,1.4', '1.4,high', 'valuenum'), ('50912', '50912.5', 'itemid'),
    ('2180-05-06 10:00:00', '06/05/2180 10:00', 'charttime'), ('2180-05-06 10:00:00', '2180-05-06', 'charttime'), (',7,70', ',,70', 'subject_id')])
@pytest.mark.parametrize('suffix', ['.csv', '.csv.gz', '.parquet'])
def test_wrong_value_names_its_place(root, old, new, column, suffix):
    rows = [LABS[2], LABS[0].replace(old, new, 1)]
    path = write(root, 'labevents', *rows)
    if suffix != '.csv': path.unlink()
    if suffix == '.csv.gz': write(root, 'labevents', *rows, suffix=suffix)
    if suffix == '.parquet':
        text = ','.join(TABLES['labevents'].columns) + '\n' + '\n'.join(rows)
        pl.read_csv(text.encode(), infer_schema=False).write_parquet(path.with_suffix('.parquet'))
    refused(lambda: read(root), 'hosp/labevents' + suffix, f'column {column}', 'row 2')
    refused(lambda: open_source(root).check(['labevents'], progress=False), f'column {column}', 'row 2')

def test_wrong_value_in_a_column_nobody_asked_for_is_found_by_check(root):
    write(root, 'labevents', LABS[0].replace('1.1,abnormal', 'high,abnormal'))
    assert len(read(root, columns=['subject_id'])) == 1
    refused(lambda: open_source(root).check(['labevents'], progress=False), 'ref_range_upper', 'row 1')

@pytest.mark.parametrize('dtype, value, column', [(pl.Float64, 41.5, 'itemid'), (pl.Boolean, True, 'itemid'), (pl.Int64, 9, 'flag'),
    (pl.Int64, 2180, 'charttime'), (pl.Datetime('us', 'UTC'), datetime(2180, 1, 1), 'charttime')])
def test_parquet_of_another_type(root, dtype, value, column):
    frame = read(root).with_columns(pl.lit(value, dtype=dtype).alias(column))
    (root/'hosp'/'labevents.csv').unlink()
    frame.write_parquet(root/'hosp'/'labevents.parquet')
    refused(lambda: read(root), 'hosp/labevents.parquet', f'column {column}')

@pytest.mark.parametrize('keep', [30, 0.5, -4])
def test_truncated_gzip(root, keep):
    (root/'hosp'/'labevents.csv').unlink()
    path = write(root, 'labevents', *[LABS[0].replace('1,7', f'{i},7') for i in range(20_000)], suffix='.csv.gz')
    whole = path.read_bytes()
    path.write_bytes(whole[:keep if isinstance(keep, int) else int(len(whole)*keep)])
    refused(lambda: read(root), 'hosp/labevents.csv.gz', 'cut off')

def test_damaged_gzip(root):
    (root/'hosp'/'labevents.csv').unlink()
    path = write(root, 'labevents', *[LABS[0].replace('1,7', f'{i},7') for i in range(20_000)], suffix='.csv.gz')
    data = bytearray(path.read_bytes())
    data[-6] ^= 255
    path.write_bytes(bytes(data))
    refused(lambda: read(root), 'hosp/labevents.csv.gz', 'damaged')

def test_names_that_do_not_say_what_is_inside(root):
    path = root/'hosp'/'labevents.csv'
    text = path.read_bytes()
    path.write_bytes(gzip.compress(text))
    refused(lambda: read(root), 'hosp/labevents.csv', 'Rename it to .csv.gz')
    path.unlink()
    path.with_suffix('.csv.gz').write_bytes(text)
    refused(lambda: read(root), 'hosp/labevents.csv.gz', 'not a gzip file')
    path.with_suffix('.csv.gz').write_bytes(b'<!DOCTYPE html><html>Log in</html>')
    refused(lambda: read(root), 'web page')
    path.with_suffix('.csv.gz').unlink()
    path.with_suffix('.parquet').write_bytes(text)
    refused(lambda: read(root), 'hosp/labevents.parquet', 'cannot be read')
    path.with_suffix('.parquet').write_bytes(b'')
    refused(lambda: read(root), 'the file is empty')

@pytest.mark.parametrize('suffix', ['.csv', '.csv.gz'])
def test_lines_with_too_many_or_too_few_fields(root, suffix):
    (root/'hosp'/'labevents.csv').unlink()
    write(root, 'labevents', LABS[2], LABS[0] + ',more', suffix=suffix)
    refused(lambda: read(root), 'row 2', '17 fields', '16')
    write(root, 'labevents', LABS[2], '2,7,70', LABS[0], suffix=suffix)
    refused(lambda: open_source(root).check(['labevents'], progress=False), 'row 2', '3 fields', '16')

def test_a_file_cut_off_in_its_last_line(root):
    path = root/'hosp'/'labevents.csv'
    write(root, 'labevents', LABS[0], LABS[0])
    path.write_bytes(path.read_bytes()[:-40])
    refused(lambda: open_source(root).scan('labevents'), 'hosp/labevents.csv', 'row 2', 'fields')
    write(root, 'labevents', LABS[0], LABS[2])
    path.write_bytes(path.read_bytes()[:-1])  # only the last line break is missing
    assert len(read(root)) == 2

def test_text_that_is_not_text(root):
    path = write(root, 'labevents', LABS[0])
    path.write_bytes(path.read_bytes().replace(b'abnormal', b'abn\xffrmal'))
    refused(lambda: read(root), 'line 2', 'UTF-8')
    write(root, 'labevents', LABS[0].replace('abnormal', '"abnormal'), LABS[0])
    refused(lambda: read(root), 'hosp/labevents.csv', 'quotation mark')

def test_empty_lines_are_rows_without_a_patient(root):
    write(root, 'labevents', LABS[0], '', LABS[1])
    refused(lambda: read(root), 'row 2', 'without a patient')

def test_duplicate_key(root):
    write(root, 'labevents', *LABS, LABS[1])
    refused(lambda: open_source(root).check(['labevents'], progress=False), 'rows 2 and 4', 'labevent_id=2')
    write(root, 'd_icd_diagnoses', '0090,9,Colitis', '0090,10,Colitis', '009,9,Other', '0090,9,Again')
    refused(lambda: open_source(root).check(['d_icd_diagnoses'], progress=False), 'rows 1 and 4', 'icd_code=0090', 'icd_version=9')
    write(root, 'd_labitems', '1,a,,', ',b,,')
    refused(lambda: open_source(root).check(['d_labitems'], progress=False), 'row 2', 'key is missing')

def test_an_engine_error_that_no_table_caused_goes_through(root):
    source = open_source(root)
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        with source.explaining('labevents'): source.scan('labevents').select('nothing').collect()

def test_an_unknown_name_is_a_mistake_of_the_caller(root):
    with pytest.raises(KeyError): open_source(root).scan('labs')
    with pytest.raises(KeyError): open_source(root).scan('labevents', ['subject'])

# -- releases, access, code maps ---------------------------------------------------------------------------------------

def test_access_is_open_only_by_a_licence(root):
    assert open_source(root).access == 'credentialed'
    (root/'LICENSE.txt').write_text('PhysioNet Credentialed Health Data License 1.5.0')
    assert open_source(root).access == 'credentialed'
    (root/'LICENSE.txt').write_text('A synthetic hospital, CC0 1.0')
    assert (open_source(root).access, open_source(root).version) == ('open', 'synthetic')

def test_releases_by_their_counts(root):
    def hospital(patients, admissions):
        (root/'hosp'/'patients.csv').write_text('subject_id,gender,anchor_age,dod\n' + '7,F,50,\n'*patients)
        (root/'hosp'/'admissions.csv').write_text(','.join(TABLES['admissions'].columns) + '\n' + '7,70,,,,,,,,,,,,,,\n'*admissions)
        return open_source(root)
    assert hospital(3, 4).version == 'unknown'
    assert hospital(100, 275).version == 'demo-2.2'
    assert hospital(*PUBLISHED['2.2'].values()).version == '2.2'
    assert hospital(*PUBLISHED['3.1'].values()).version == '3.x'
    (root/'CHANGELOG.txt').write_text('## v3.0\nnew patients\n## v3.1\nfewer mistakes\n')
    assert open_source(root).version == '3.1'
    named = root.parent/'mimic-iv-3.0'
    root.rename(named)
    assert open_source(named).version == '3.0'

def test_code_maps(root, tmp_path):
    assert open_source(root).codes is None and code_map(open_source(root), 'd_ccs_diagnoses') is None
    beside, inside, named = tmp_path/'codes', root/'codes', tmp_path/'mine'
    for folder, name in ((beside, 'beside'), (inside, 'inside'), (named, 'named')):
        folder.mkdir()
        (folder/'d_ccs_diagnoses.csv').write_text(f'icd_code,icd_version,long_title\n0090,9,{name}\n')
        assert code_map(open_source(root), 'd_ccs_diagnoses').rows() == [('0090', '9', name if name != 'named' else 'inside')]
    assert code_map(open_source(root, codes=named), 'd_ccs_diagnoses')['long_title'].to_list() == ['named']
    assert code_map(open_source(root), 'd_atc_prescriptions') is None
    (inside/'d_ccs_diagnoses.csv').write_text('icd_code,icd_version,long_title\n0090,9,a\n0090,9,b\n')
    refused(lambda: code_map(open_source(root), 'd_ccs_diagnoses'), 'codes/d_ccs_diagnoses.csv', 'rows 1 and 2')
    (inside/'d_ccs_diagnoses.csv').write_text('icd_code,long_title\n0090,a\n')
    refused(lambda: code_map(open_source(root), 'd_ccs_diagnoses'), 'codes/d_ccs_diagnoses.csv', 'no column icd_version')
    with pytest.raises(TableError): open_source(root, codes=tmp_path/'nowhere')

# -- the demo ----------------------------------------------------------------------------------------------------------

def test_the_demo_has_its_published_rows(demo):
    source = open_source(demo)
    assert (source.version, source.access) == ('demo-2.2', 'open')
    counts = source.check(progress=False)
    known = counts.filter(pl.col('published').is_not_null())
    assert len(known) == 34 and (known['rows'] == known['published']).all()

def test_the_demo_has_the_columns_of_the_description(demo):
    source = open_source(demo)
    for name, path in source.files.items():
        with gzip.open(path, 'rt') as f: assert f.readline().lower().strip().split(',') == list(TABLES[name].columns)

def test_a_demo_table_in_parquet(demo, tmp_path):
    source = open_source(demo)
    for name, path in source.files.items():
        folder = tmp_path/TABLES[name].module
        folder.mkdir(exist_ok=True)
        if name in ('microbiologyevents', 'procedureevents', 'medrecon', 'patients'): source.scan(name).collect().write_parquet(folder/f'{name}.parquet')
        else: (folder/path.name).symlink_to(path)
    other = open_source(tmp_path)
    for name in ('microbiologyevents', 'procedureevents', 'medrecon', 'patients'):
        assert_frame_equal(other.scan(name).collect(), source.scan(name).collect())

def test_code_maps_of_the_demo(demo):
    source = open_source(demo)
    if source.codes is None: pytest.skip('no code maps beside the demo')
    for name, t in CODE_MAPS.items():
        frame = code_map(source, name)
        assert set(frame.dtypes) == {pl.String} and set(frame.columns) == t.needed and len(frame) > 80_000
