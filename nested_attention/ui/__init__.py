"""The Gradio app. `studio` knows the pipeline and no Gradio; the panels know Gradio and only the studio."""
