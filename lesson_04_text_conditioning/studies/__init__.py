"""The measurements of lessons 4 and 5 on captioned digits: what their experiments share."""
