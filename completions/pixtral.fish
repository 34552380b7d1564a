# Tab completion of pixtral for fish, written by `pixtral completions fish`.
# Its place: ~/.config/fish/completions/pixtral.fish

function __pixtral_words
    string match --invert -- '-*' (commandline -opc)[2..]
end

# Whether the words before the cursor that are no flags are these, and no others.
function __pixtral_only
    set -l words (__pixtral_words)
    test "$words" = "$argv"
end

# Whether they begin with these.
function __pixtral_in
    set -l words (__pixtral_words)
    set words $words[1..(count $argv)]
    test "$words" = "$argv"
end

# What only the program knows: models, devices. (After the tab would come a description.)
function __pixtral_ask
    set -l program (string replace -r '^~/' $HOME/ -- (commandline -opc)[1])
    $program completions $argv 2>/dev/null | string replace -r '$' \t
end

# Folders, and files with one of the endings; all files where no ending is given, or nothing fits. The ending / is no
# file's: folders only.
function __pixtral_files
    set -l typed (string replace -r -- '^--[^=]*=' '' (commandline -ct))
    set -l here (complete -C "'' $typed" | string replace -r '\t.*' '')
    set -l fitting $here
    if set -q argv[1]
        set fitting (string match -ri -- '^.*(?:/|\.(?:'(string join '|' $argv)'))$' $here)
        set -q fitting[1]; or test $argv[1] = /; or set fitting $here
    end
    string replace -r '$' \t -- $fitting
end

complete -c pixtral -f

complete -c pixtral -n '__pixtral_only' -a run -d 'Ask a model about pictures and text, and stream the answer'
complete -c pixtral -n '__pixtral_only' -a serve -d 'Serve a model over HTTP, with OpenAI\'s API and a chat page'
complete -c pixtral -n '__pixtral_only' -a tokenize -d 'Show the tokens of a request and what each picture costs'
complete -c pixtral -n '__pixtral_only' -a download -d 'Download a model and print its folder'
complete -c pixtral -n '__pixtral_only' -a inspect -d 'Show what a model is and how much memory it needs, before it is downloaded'
complete -c pixtral -n '__pixtral_only' -a export -d 'Write a model as one file that loads immediately'
complete -c pixtral -n '__pixtral_only' -a verify -d 'Check every hash in a serialized model'
complete -c pixtral -n '__pixtral_only' -a bench -d 'Measure speed and memory on this machine'
complete -c pixtral -n '__pixtral_only' -a completions -d 'Print a shell script that completes commands, flags, models and files'
complete -c pixtral -n '__pixtral_only' -a cache -d 'List, check and remove the models on this machine'
complete -c pixtral -n '__pixtral_only' -l version -d 'Print the version'
complete -c pixtral -n '__pixtral_only' -l install-completion -d 'Install completion for the current shell'
complete -c pixtral -n '__pixtral_only' -l show-completion -d 'Show completion for the current shell, to copy it or customize the installation'
complete -c pixtral -n '__pixtral_only' -s h -l help -d 'Show this message and exit'

complete -c pixtral -n '__pixtral_in run' -s p -l prompt -x -d 'The question'
complete -c pixtral -n '__pixtral_in run' -s i -l image -x -a '(__pixtral_files png jpg jpeg webp gif bmp tif tiff)' -d 'A file, an http(s) URL, a data: URI, or - for standard input'
complete -c pixtral -n '__pixtral_in run' -l system -x -d 'Instructions on how to answer (the system prompt). default: those that the model brings'
complete -c pixtral -n '__pixtral_in run' -l messages -x -a '(__pixtral_files json)' -d 'A whole conversation: an OpenAI-style list of messages in JSON'
complete -c pixtral -n '__pixtral_in run' -l raw -d 'Continue the text as it is, without a chat template'
complete -c pixtral -n '__pixtral_in run' -l reasoning-effort -x -a 'none\t high\t' -d 'How hard to think before answering, for models that can be told'
complete -c pixtral -n '__pixtral_in run' -l model-path -x -a '(__pixtral_ask models) (__pixtral_files gguf)' -d 'A Hugging Face name, a local folder, a .gguf file, or tiny, the built-in demonstration model'
complete -c pixtral -n '__pixtral_in run' -l image-preprocessing -x -a 'hf\t native\t' -d 'How pictures become pixels: as in transformers (hf) or as in mistral-common (native)'
complete -c pixtral -n '__pixtral_in run' -l trust-remote-code -d 'Accepted for compatibility, without effect: code from a repository is never run'
complete -c pixtral -n '__pixtral_in run' -l weights-format -x -a 'hf\t native\t gguf\t' -d 'Which format to read if the model has several'
complete -c pixtral -n '__pixtral_in run' -l force-download -d 'Download again, even if the model is cached'
complete -c pixtral -n '__pixtral_in run' -l max-new-tokens -x -d 'Maximum length of the answer. -1: until the context is full'
complete -c pixtral -n '__pixtral_in run' -l top-k -x -d 'Choose among the N most likely tokens; 0 is off'
complete -c pixtral -n '__pixtral_in run' -l temperature -x -d '0 always takes the most likely token, 1 follows the model, higher is more random'
complete -c pixtral -n '__pixtral_in run' -l top-p -x -d 'Choose among the most likely tokens that together have this probability'
complete -c pixtral -n '__pixtral_in run' -l min-p -x -d 'Leave out tokens whose probability is below this share of the most likely token\'s'
complete -c pixtral -n '__pixtral_in run' -l repetition-penalty -x -d 'Above 1 makes tokens less likely that have already occurred'
complete -c pixtral -n '__pixtral_in run' -l seed -x -d 'With the same seed, the same tokens are chosen'
complete -c pixtral -n '__pixtral_in run' -l stop -x -d 'End the answer before this text'
complete -c pixtral -n '__pixtral_in run' -l ignore-eos -d 'Continue after the model\'s end-of-answer token'
complete -c pixtral -n '__pixtral_in run' -l json -d 'Print one JSON object'
complete -c pixtral -n '__pixtral_in run' -l quiet -d 'On standard error, print nothing but errors'
complete -c pixtral -n '__pixtral_in run' -l no-reasoning -d 'Do not show what the model thinks before it answers'
complete -c pixtral -n '__pixtral_in run' -l stats -d 'Print token counts and speeds on standard error'
complete -c pixtral -n '__pixtral_in run' -l logprobs -d 'Print each token\'s log-probability: in the JSON object, else on standard error'
complete -c pixtral -n '__pixtral_in run' -l devices -x -a '(__pixtral_ask devices)' -d 'cpu, gpu or gpu-N'
complete -c pixtral -n '__pixtral_in run' -l max-length -x -d 'Maximum length of prompt and answer together'
complete -c pixtral -n '__pixtral_in run' -l max-batch-size -x -d 'How many requests are decoded together'
complete -c pixtral -n '__pixtral_in run' -l max-ce-batch-size -x -d 'How many prompts are read together'
complete -c pixtral -n '__pixtral_in run' -l kv-cache-dtype -x -a 'auto\t fp8\t' -d 'How keys and values are kept: auto as the model computes, fp8 in half the memory'
complete -c pixtral -n '__pixtral_in run' -l speculative -x -a 'auto\t off\t' -d 'Look up in prompt and answer what may come next, and compute it at once where that pays: the same answer, sooner. off: never'
complete -c pixtral -n '__pixtral_in run' -l save-to-serialized-model-path -x -a '(__pixtral_files)' -d 'Save the loaded model as one file that loads immediately'
complete -c pixtral -n '__pixtral_in run' -l serialized-model-path -x -a '(__pixtral_ask serialized) (__pixtral_files)' -d 'Load a file written by `pixtral export` or --save-to-serialized-model-path'
complete -c pixtral -n '__pixtral_in run' -l weight-path -x -a '(__pixtral_files safetensors gguf)' -d 'Read the weights from this file or folder instead'
complete -c pixtral -n '__pixtral_in run' -l quantization-encoding -x -a 'float32\t bfloat16\t fp8\t q6_k\t q4_0\t q4_k\t nf4\t' -d 'How the weights are stored: float32, bfloat16, fp8, q6_k, q4_0, q4_k, nf4'
complete -c pixtral -n '__pixtral_in run' -l quantize-vision -d 'Pack the picture part too; otherwise it stays bfloat16'
complete -c pixtral -n '__pixtral_in run' -l double-quantization -d 'nf4 only: pack its scales too, for 8 % less memory'
complete -c pixtral -n '__pixtral_in run' -s h -l help -d 'Show this message and exit'

complete -c pixtral -n '__pixtral_in serve' -l host -x -d 'The address to bind'
complete -c pixtral -n '__pixtral_in serve' -l port -x -d 'The port; 0 takes any free port'
complete -c pixtral -n '__pixtral_in serve' -l served-model-name -x -d 'The model\'s name in requests'
complete -c pixtral -n '__pixtral_in serve' -l drain-timeout -x -d 'How long running requests may take to finish after SIGTERM or Ctrl-C'
complete -c pixtral -n '__pixtral_in serve' -l quiet -d 'On standard error, print nothing but errors'
complete -c pixtral -n '__pixtral_in serve' -l model-path -x -a '(__pixtral_ask models) (__pixtral_files gguf)' -d 'A Hugging Face name, a local folder, a .gguf file, or tiny, the built-in demonstration model'
complete -c pixtral -n '__pixtral_in serve' -l image-preprocessing -x -a 'hf\t native\t' -d 'How pictures become pixels: as in transformers (hf) or as in mistral-common (native)'
complete -c pixtral -n '__pixtral_in serve' -l trust-remote-code -d 'Accepted for compatibility, without effect: code from a repository is never run'
complete -c pixtral -n '__pixtral_in serve' -l weights-format -x -a 'hf\t native\t gguf\t' -d 'Which format to read if the model has several'
complete -c pixtral -n '__pixtral_in serve' -l force-download -d 'Download again, even if the model is cached'
complete -c pixtral -n '__pixtral_in serve' -l max-new-tokens -x -d 'Maximum length of the answer. -1: until the context is full'
complete -c pixtral -n '__pixtral_in serve' -l top-k -x -d 'Choose among the N most likely tokens; 0 is off'
complete -c pixtral -n '__pixtral_in serve' -l temperature -x -d '0 always takes the most likely token, 1 follows the model, higher is more random'
complete -c pixtral -n '__pixtral_in serve' -l top-p -x -d 'Choose among the most likely tokens that together have this probability'
complete -c pixtral -n '__pixtral_in serve' -l min-p -x -d 'Leave out tokens whose probability is below this share of the most likely token\'s'
complete -c pixtral -n '__pixtral_in serve' -l repetition-penalty -x -d 'Above 1 makes tokens less likely that have already occurred'
complete -c pixtral -n '__pixtral_in serve' -l reasoning-effort -x -a 'none\t high\t' -d 'How hard to think before answering, for models that can be told'
complete -c pixtral -n '__pixtral_in serve' -l api-key -x -d 'Require this key'
complete -c pixtral -n '__pixtral_in serve' -l insecure -d 'Let everybody who can reach --host use the server without a key'
complete -c pixtral -n '__pixtral_in serve' -l allow-media-domain -x -d 'Fetch pictures only from this host; *.example.org stands for its subdomains'
complete -c pixtral -n '__pixtral_in serve' -l allow-private-media -x -d 'Also fetch pictures from this private network'
complete -c pixtral -n '__pixtral_in serve' -l media-path -x -a '(__pixtral_files /)' -d 'Requests may name picture files below this folder'
complete -c pixtral -n '__pixtral_in serve' -l max-queue -x -d 'How many requests may wait; more get 429'
complete -c pixtral -n '__pixtral_in serve' -l max-images -x -d 'Maximum number of pictures in one request'
complete -c pixtral -n '__pixtral_in serve' -l max-body-mib -x -d 'Maximum size of one request in MiB'
complete -c pixtral -n '__pixtral_in serve' -l max-batch-size -x -d 'How many requests are decoded together'
complete -c pixtral -n '__pixtral_in serve' -l kv-cache-memory -x -d 'Memory for keys and values, such as 8GiB'
complete -c pixtral -n '__pixtral_in serve' -l image-cache-memory -x -d 'Memory for the features of earlier pictures'
complete -c pixtral -n '__pixtral_in serve' -l weight-path -x -a '(__pixtral_files safetensors gguf)' -d 'Read the weights from this file or folder instead'
complete -c pixtral -n '__pixtral_in serve' -l quantization-encoding -x -a 'float32\t bfloat16\t fp8\t q6_k\t q4_0\t q4_k\t nf4\t' -d 'How the weights are stored: float32, bfloat16, fp8, q6_k, q4_0, q4_k, nf4'
complete -c pixtral -n '__pixtral_in serve' -l quantize-vision -d 'Pack the picture part too; otherwise it stays bfloat16'
complete -c pixtral -n '__pixtral_in serve' -l double-quantization -d 'nf4 only: pack its scales too, for 8 % less memory'
complete -c pixtral -n '__pixtral_in serve' -l devices -x -a '(__pixtral_ask devices)' -d 'cpu, gpu or gpu-N'
complete -c pixtral -n '__pixtral_in serve' -l max-length -x -d 'Maximum length of prompt and answer together'
complete -c pixtral -n '__pixtral_in serve' -l max-ce-batch-size -x -d 'How many prompts are read together'
complete -c pixtral -n '__pixtral_in serve' -l kv-cache-dtype -x -a 'auto\t fp8\t' -d 'How keys and values are kept: auto as the model computes, fp8 in half the memory'
complete -c pixtral -n '__pixtral_in serve' -l speculative -x -a 'auto\t off\t' -d 'Look up in prompt and answer what may come next, and compute it at once where that pays: the same answer, sooner. off: never'
complete -c pixtral -n '__pixtral_in serve' -l save-to-serialized-model-path -x -a '(__pixtral_files)' -d 'Save the loaded model as one file that loads immediately'
complete -c pixtral -n '__pixtral_in serve' -l serialized-model-path -x -a '(__pixtral_ask serialized) (__pixtral_files)' -d 'Load a file written by `pixtral export` or --save-to-serialized-model-path'
complete -c pixtral -n '__pixtral_in serve' -s h -l help -d 'Show this message and exit'

complete -c pixtral -n '__pixtral_in tokenize' -s p -l prompt -x -d 'The question'
complete -c pixtral -n '__pixtral_in tokenize' -s i -l image -x -a '(__pixtral_files png jpg jpeg webp gif bmp tif tiff)' -d 'A file, an http(s) URL, a data: URI, or - for standard input'
complete -c pixtral -n '__pixtral_in tokenize' -l system -x -d 'Instructions on how to answer (the system prompt). default: those that the model brings'
complete -c pixtral -n '__pixtral_in tokenize' -l messages -x -a '(__pixtral_files json)' -d 'A whole conversation: an OpenAI-style list of messages in JSON'
complete -c pixtral -n '__pixtral_in tokenize' -l raw -d 'Continue the text as it is, without a chat template'
complete -c pixtral -n '__pixtral_in tokenize' -l reasoning-effort -x -a 'none\t high\t' -d 'How hard to think before answering, for models that can be told'
complete -c pixtral -n '__pixtral_in tokenize' -l model-path -x -a '(__pixtral_ask models) (__pixtral_files gguf)' -d 'A Hugging Face name, a local folder, a .gguf file, or tiny, the built-in demonstration model'
complete -c pixtral -n '__pixtral_in tokenize' -l image-preprocessing -x -a 'hf\t native\t' -d 'How pictures become pixels: as in transformers (hf) or as in mistral-common (native)'
complete -c pixtral -n '__pixtral_in tokenize' -l trust-remote-code -d 'Accepted for compatibility, without effect: code from a repository is never run'
complete -c pixtral -n '__pixtral_in tokenize' -l weights-format -x -a 'hf\t native\t gguf\t' -d 'Which format to read if the model has several'
complete -c pixtral -n '__pixtral_in tokenize' -l force-download -d 'Download again, even if the model is cached'
complete -c pixtral -n '__pixtral_in tokenize' -l json -d 'Print one JSON object'
complete -c pixtral -n '__pixtral_in tokenize' -l quiet -d 'On standard error, print nothing but errors'
complete -c pixtral -n '__pixtral_in tokenize' -s h -l help -d 'Show this message and exit'

complete -c pixtral -n '__pixtral_in download' -l weights-format -x -a 'hf\t native\t gguf\t' -d 'Which format to read if the model has several'
complete -c pixtral -n '__pixtral_in download' -l force-download -d 'Download again, even if the model is cached'
complete -c pixtral -n '__pixtral_in download' -l json -d 'Print one JSON object'
complete -c pixtral -n '__pixtral_in download' -l quiet -d 'On standard error, print nothing but errors'
complete -c pixtral -n '__pixtral_in download' -s h -l help -d 'Show this message and exit'
complete -c pixtral -n '__pixtral_in download' -a '(__pixtral_ask models) (__pixtral_files gguf)'

complete -c pixtral -n '__pixtral_in inspect' -l weights-format -x -a 'hf\t native\t gguf\t' -d 'Which format to look at if the model has several'
complete -c pixtral -n '__pixtral_in inspect' -l kv-cache-dtype -x -a 'auto\t fp8\t' -d 'How keys and values are kept: auto as the model computes, fp8 in half the memory'
complete -c pixtral -n '__pixtral_in inspect' -l json -d 'Print one JSON object'
complete -c pixtral -n '__pixtral_in inspect' -l quiet -d 'On standard error, print nothing but errors'
complete -c pixtral -n '__pixtral_in inspect' -s h -l help -d 'Show this message and exit'
complete -c pixtral -n '__pixtral_in inspect' -a '(__pixtral_ask all-models) (__pixtral_files)'

complete -c pixtral -n '__pixtral_in export' -l weight-path -x -a '(__pixtral_files safetensors gguf)' -d 'Read the weights from this file or folder instead'
complete -c pixtral -n '__pixtral_in export' -l quantization-encoding -x -a 'float32\t bfloat16\t fp8\t q6_k\t q4_0\t q4_k\t nf4\t' -d 'How the weights are stored: float32, bfloat16, fp8, q6_k, q4_0, q4_k, nf4'
complete -c pixtral -n '__pixtral_in export' -l quantize-vision -d 'Pack the picture part too; otherwise it stays bfloat16'
complete -c pixtral -n '__pixtral_in export' -l double-quantization -d 'nf4 only: pack its scales too, for 8 % less memory'
complete -c pixtral -n '__pixtral_in export' -l weights-format -x -a 'hf\t native\t gguf\t' -d 'Which format to read if the model has several'
complete -c pixtral -n '__pixtral_in export' -l force-download -d 'Download again, even if the model is cached'
complete -c pixtral -n '__pixtral_in export' -l json -d 'Print one JSON object'
complete -c pixtral -n '__pixtral_in export' -l quiet -d 'On standard error, print nothing but errors'
complete -c pixtral -n '__pixtral_in export' -s h -l help -d 'Show this message and exit'
complete -c pixtral -n '__pixtral_in export' -a '(__pixtral_ask models) (__pixtral_files gguf)'
complete -c pixtral -n '__pixtral_in export' -a '(__pixtral_files)'

complete -c pixtral -n '__pixtral_in verify' -l json -d 'Print one JSON object'
complete -c pixtral -n '__pixtral_in verify' -l quiet -d 'On standard error, print nothing but errors'
complete -c pixtral -n '__pixtral_in verify' -s h -l help -d 'Show this message and exit'
complete -c pixtral -n '__pixtral_in verify' -a '(__pixtral_ask serialized) (__pixtral_files)'

complete -c pixtral -n '__pixtral_in bench' -l model-path -x -a '(__pixtral_ask models) (__pixtral_files gguf)' -d 'A Hugging Face name, a local folder, a .gguf or an exported file, or tiny'
complete -c pixtral -n '__pixtral_in bench' -l shape -x -a '1b\t 3b\t 8b\t nemo-12b\t ministral-3b\t small-24b\t' -d 'Measure random weights of this size instead: no download'
complete -c pixtral -n '__pixtral_in bench' -l quantization-encoding -x -a 'float32\t bfloat16\t fp8\t q8_0\t q6_k\t q5_k\t q4_k\t q4_0\t nf4\t' -d 'How the weights are stored'
complete -c pixtral -n '__pixtral_in bench' -l prompt-tokens -x -d 'Length of the prompt'
complete -c pixtral -n '__pixtral_in bench' -l new-tokens -x -d 'How many tokens are decoded'
complete -c pixtral -n '__pixtral_in bench' -l batch-sizes -x -d 'How many requests are decoded together'
complete -c pixtral -n '__pixtral_in bench' -l image -x -d 'Measure a picture of this size too, in pixels; a shape gets the vision tower of its family for it'
complete -c pixtral -n '__pixtral_in bench' -l repeats -x -d 'Rounds, whose median counts'
complete -c pixtral -n '__pixtral_in bench' -l devices -x -a '(__pixtral_ask devices)' -d 'cpu, gpu or gpu-N'
complete -c pixtral -n '__pixtral_in bench' -l compare -d 'Measure transformers and llama.cpp (llama-cpp-python) beside it, where installed'
complete -c pixtral -n '__pixtral_in bench' -l json -x -a '(__pixtral_files)' -d 'Write the figures as one JSON object; - is standard output, without the table'
complete -c pixtral -n '__pixtral_in bench' -s h -l help -d 'Show this message and exit'

complete -c pixtral -n '__pixtral_in completions' -s h -l help -d 'Show this message and exit'
complete -c pixtral -n '__pixtral_in completions' -a 'bash\t zsh\t fish\t'

complete -c pixtral -n '__pixtral_only cache' -a list -d 'List the models on this machine'
complete -c pixtral -n '__pixtral_only cache' -a path -d 'Print the folders of the Hub\'s cache and of pixtral\'s own'
complete -c pixtral -n '__pixtral_only cache' -a verify -d 'Check every file against its hash'
complete -c pixtral -n '__pixtral_only cache' -a remove -d 'Remove models by name'
complete -c pixtral -n '__pixtral_only cache' -a prune -d 'Remove models that pixtral has used, but not for a long time'
complete -c pixtral -n '__pixtral_only cache' -s h -l help -d 'Show this message and exit'

complete -c pixtral -n '__pixtral_in cache list' -l json -d 'Print one JSON object'
complete -c pixtral -n '__pixtral_in cache list' -l quiet -d 'On standard error, print nothing but errors'
complete -c pixtral -n '__pixtral_in cache list' -s h -l help -d 'Show this message and exit'

complete -c pixtral -n '__pixtral_in cache path' -l json -d 'Print one JSON object'
complete -c pixtral -n '__pixtral_in cache path' -l quiet -d 'On standard error, print nothing but errors'
complete -c pixtral -n '__pixtral_in cache path' -s h -l help -d 'Show this message and exit'

complete -c pixtral -n '__pixtral_in cache verify' -l json -d 'Print one JSON object'
complete -c pixtral -n '__pixtral_in cache verify' -l quiet -d 'On standard error, print nothing but errors'
complete -c pixtral -n '__pixtral_in cache verify' -s h -l help -d 'Show this message and exit'
complete -c pixtral -n '__pixtral_in cache verify' -a '(__pixtral_ask cached)'

complete -c pixtral -n '__pixtral_in cache remove' -s y -l yes -d 'Do not ask first'
complete -c pixtral -n '__pixtral_in cache remove' -l json -d 'Print one JSON object'
complete -c pixtral -n '__pixtral_in cache remove' -l quiet -d 'On standard error, print nothing but errors'
complete -c pixtral -n '__pixtral_in cache remove' -s h -l help -d 'Show this message and exit'
complete -c pixtral -n '__pixtral_in cache remove' -a '(__pixtral_ask cached)'

complete -c pixtral -n '__pixtral_in cache prune' -l older-than -x -d 'Remove models not used for this long: 12h, 30d or 4w'
complete -c pixtral -n '__pixtral_in cache prune' -s y -l yes -d 'Do not ask first'
complete -c pixtral -n '__pixtral_in cache prune' -l json -d 'Print one JSON object'
complete -c pixtral -n '__pixtral_in cache prune' -l quiet -d 'On standard error, print nothing but errors'
complete -c pixtral -n '__pixtral_in cache prune' -s h -l help -d 'Show this message and exit'
