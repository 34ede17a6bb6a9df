"""An endpoint that speaks OpenAI's protocol and takes the steering's scale with each request, and its playground."""
