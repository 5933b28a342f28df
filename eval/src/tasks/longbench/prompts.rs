//! LongBench's prompts, split as kvpress splits them, with the official lengths of answers. The spelling is theirs.

/// How one data set asks, and how it is scored.
#[derive(Debug)]
pub struct Prompt {
    pub name: &'static str,
    pub context: &'static str,
    pub question: &'static str,
    pub answer_prefix: &'static str,
    pub tokens: usize,
    pub metric: Metric,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Metric {
    F1,
    F1Zh,
    Rouge,
    RougeZh,
    Classes,
    Retrieval,
    Count,
    Code,
}

const fn prompt(
    name: &'static str,
    tokens: usize,
    metric: Metric,
    context: &'static str,
    question: &'static str,
    answer_prefix: &'static str,
) -> Prompt {
    Prompt { name, context, question, answer_prefix, tokens, metric }
}

/// Of the three data sets of multi-hop questions.
const PASSAGES: &str = "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words.\n\n";
const CODE: &str = "Please complete the code given below. \n{context}";

pub const PROMPTS: [Prompt; 21] = [
    prompt(
        "narrativeqa",
        128,
        Metric::F1,
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: {context}\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n",
        "Question: {input}\n\n",
        "Answer:",
    ),
    prompt(
        "qasper",
        128,
        Metric::F1,
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the information in the article, write \"unanswerable\". If the question is a yes/no question, answer \"yes\", \"no\", or \"unanswerable\". Do not provide any explanation.\n\nArticle: {context}\n\n Answer the question based on the above article as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the information in the article, write \"unanswerable\". If the question is a yes/no question, answer \"yes\", \"no\", or \"unanswerable\". Do not provide any explanation.\n\n",
        "Question: {input}\n\n",
        "Answer:",
    ),
    prompt(
        "multifieldqa_en",
        64,
        Metric::F1,
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the above text, only give me the answer and do not output any other words.\n\n",
        "Question: {input}\n",
        "Answer:",
    ),
    prompt(
        "multifieldqa_zh",
        64,
        Metric::F1Zh,
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n",
        "问题：{input}\n",
        "回答：",
    ),
    prompt("hotpotqa", 32, Metric::F1, PASSAGES, "Question: {input}\n", "Answer:"),
    prompt("2wikimqa", 32, Metric::F1, PASSAGES, "Question: {input}\n", "Answer:"),
    prompt("musique", 32, Metric::F1, PASSAGES, "Question: {input}\n", "Answer:"),
    prompt(
        "dureader",
        128,
        Metric::RougeZh,
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n",
        "问题：{input}\n",
        "回答：",
    ),
    prompt(
        "gov_report",
        512,
        Metric::Rouge,
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\n",
        "Now, write a one-page summary of the report.\n\n",
        "Summary:",
    ),
    prompt(
        "qmsum",
        512,
        Metric::Rouge,
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript in one or more sentences.\n\n",
        "Query: {input}\n",
        "Answer:",
    ),
    prompt(
        "multi_news",
        512,
        Metric::Rouge,
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n",
        "Now, write a one-page summary of all the news.\n\n",
        "Summary:",
    ),
    prompt(
        "vcsum",
        512,
        Metric::RougeZh,
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n",
        "",
        "会议总结：",
    ),
    prompt(
        "trec",
        64,
        Metric::Classes,
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n",
        "{input}",
        "Type:",
    ),
    prompt(
        "triviaqa",
        32,
        Metric::F1,
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. The following are some examples.\n\n{context}\n\n",
        "{input}",
        "Answer:",
    ),
    prompt(
        "samsum",
        128,
        Metric::Rouge,
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n",
        "{input}",
        "Summary:",
    ),
    prompt(
        "lsht",
        64,
        Metric::Classes,
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n",
        "{input}",
        "",
    ),
    prompt(
        "passage_count",
        32,
        Metric::Count,
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\n",
        "Please enter the final count of unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, 3, and so on.\n\n",
        "The final answer is: ",
    ),
    prompt(
        "passage_retrieval_en",
        32,
        Metric::Retrieval,
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n",
        "{input}\n\nPlease enter the number of the paragraph that the abstract is from. The answer format must be like \"Paragraph 1\", \"Paragraph 2\", etc.\n\n",
        "The answer is: ",
    ),
    prompt(
        "passage_retrieval_zh",
        32,
        Metric::Retrieval,
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n",
        "{input}\n\n请输入摘要所属段落的编号。答案格式必须是\"段落1\"，\"段落2\"等格式\n\n",
        "答案是：",
    ),
    prompt("lcc", 64, Metric::Code, CODE, "{input}", "Next line of code:\n"),
    prompt("repobench-p", 64, Metric::Code, CODE, "{input}", "Next line of code:\n"),
];
