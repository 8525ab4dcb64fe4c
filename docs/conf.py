"""Sphinx settings of the site; docs/pages.py prepares the pages."""
project = 'ehr_r1'
author = 'The ehr_r1 authors'
copyright = '2026 onwards, ' + author
extensions = ['myst_nb']
html_theme = 'sphinx_book_theme'
html_title = 'ehr_r1'
html_show_sourcelink = False
html_copy_source = False
html_static_path = ['_static']
html_css_files = ['site.css']
html_theme_options = dict(home_page_in_toc=True, show_toc_level=2,
                          use_download_button=False, use_fullscreen_button=False)
nb_execution_mode = 'off'              # pages show the outputs that are stored
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['colon_fence', 'dollarmath']
myst_heading_anchors = 3
suppress_warnings = ['myst.header']    # a definition is a third-level heading wherever it stands
