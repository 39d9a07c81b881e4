"""Sphinx's configuration of the site; `python -m common.site` calls Sphinx with it."""

from common.site.sources import repository_url

project = "Text-to-image diffusion"
html_title = "Text-to-image diffusion, in six lessons"
author = project_copyright = ""
extensions = ["myst_nb", "sphinx_copybutton", "sphinx_design", "sphinx-mathjax-offline"]
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "html_image"]
myst_heading_anchors = 4
# Sections of the lessons begin with a number or an exercise, and not all lessons begin at the same depth.
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]
html_theme = "sphinx_book_theme"
html_theme_options = {
    "repository_url": repository_url(),
    "use_repository_button": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": False,
    "navbar_persistent": [],  # the search field is in the side bar
}
html_context = {"default_mode": "auto"}
html_favicon = "static/seven.png"
html_static_path = ["static"]
html_css_files = ["course.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
copybutton_exclude = ".linenos, .gp, .go"
