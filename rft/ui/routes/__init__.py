"""What is below /ui/api, one module per noun. Each finds its runs through `request.app.state.page`."""
