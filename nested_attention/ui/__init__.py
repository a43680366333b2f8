"""The Gradio app. `studio` knows the pipeline and no Gradio; the panels know Gradio, and reach the pipeline through the studio's sessions."""
