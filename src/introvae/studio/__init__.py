"""A page on which people look at a trained model: `view` is what it shows, `page` the web page around it."""
